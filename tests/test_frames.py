"""Every frame of a clip through the loader, a step, a run, evaluation and other tasks."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from audiotext_dist.data.loader import EvaluationBatches
from audiotext_dist.data.shard import load_shards
from audiotext_dist.distributed import World
from audiotext_dist.errors import UserError
from audiotext_dist.models.dual_encoder import unit_length
from audiotext_dist.training.prepare import Prepared, build_towers, prepare
from audiotext_dist.training.recipe import read_recipe
from audiotext_dist.training.step import train_step
from audiotext_dist.training.tracker import read_metrics
from audiotext_dist.training.weights import read_weights
from launch import evaluate, frames
from shards.sources.soundscape import SoundscapeConfig, records, script
from tests.clips import SAMPLE_RATE_HZ, make_sample, write_shards
from tests.losses.small_model import AveragingEngine, gradients, watch
from tests.ranks import run_command_on_ranks

SMALL = [
    "name=test",
    "task=audio-image",
    f"data.sample_rate_hz={SAMPLE_RATE_HZ}",
    "data.clip_seconds=1.0",
    "data.num_workers=0",
    "data.num_lanes=2",
    "model.audio.name=tiny-audio-32",
    "model.audio.fbank={frame_shift_ms: 5, num_fbank_frames: 196, time_mask_frames: 0}",
    "model.image.name=tiny-64",
    "model.text.name=tiny-64",
    "training.global_batch_size=4",
    "training.num_epochs=3",
    "optim.weight_lr=1e-3",
    "tracker={every_steps: 1, wandb: disabled}",
    "evaluation.every_epochs=100",
    "checkpoint.every_epochs=100",
]
METHODS = {
    "one": [],
    "nearest": ["loss.frame_match=nearest"],
    "maximum": ["loss.frame_match=maximum"],
    "segments": ["loss.frame_match=multiframe", "model.audio.num_outputs=4"],
    "tokens": ["loss.frame_match=multiframe", "model.audio.num_outputs=4", "model.audio.outputs=tokens"],
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    """Twelve clips with the features of seed 0's image tower."""
    folder = tmp_path_factory.mktemp("frames") / "set"
    write_shards(folder, [[make_sample(6 * shard + row) for row in range(6)] for shard in range(2)])
    done = run_command_on_ranks("embed", [*SMALL, f"shards={folder}", "features=own"], 1)
    assert done.returncode == 0, done.stderr
    return str(folder)


def sets(shards: str, run_dir: Path) -> list[str]:
    return [f"data.train.own.shards={shards}", f"data.validation.own.shards={shards}", f"run_dir={run_dir}"]


def prepared(shards: str, tmp_path: Path, *words: str) -> Prepared:
    return prepare(read_recipe([*SMALL, *sets(shards, tmp_path), *words]), World())


def train(shards: str, run_dir: Path, *words: str) -> None:
    done = run_command_on_ranks("pretrain", [*SMALL, *sets(shards, run_dir), *words], 1)
    assert done.returncode == 0, done.stderr


def one_step(run: Prepared, *, epoch: int = 0, num_micro_batches: int = 1, dtype: torch.dtype | None = None):
    """What the step says, and the audio tower's gradients."""
    (batch,) = run.batches(range(3, 4))
    run.model.train().zero_grad()
    run.model.autocast_dtype = dtype
    engine = AveragingEngine(run.model, num_micro_batches)
    result = train_step(engine, run.model, batch, watch(), run.recipe.loss, epoch, dtype)
    return result, [gradient.clone() for gradient in gradients(run.model.audio)]


@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_the_same_from_jpegs_and_features_and_in_micro_batches(shards, tmp_path, method):
    from_jpegs = prepared(shards, tmp_path, *METHODS[method])
    result, expected = one_step(from_jpegs)
    shares = [value for name, value in result.figures.items() if name.startswith("frame_")]
    assert (len(shares), sum(shares)) == ((4, pytest.approx(1)) if method in ("nearest", "maximum") else (0, 0))
    from_features = prepared(shards, tmp_path, *METHODS[method], "data.frame_features=own")
    for run, num_micro_batches in ((from_jpegs, 2), (from_features, 1), (from_features, 4)):
        other, found = one_step(run, num_micro_batches=num_micro_batches)
        assert other.loss == pytest.approx(result.loss, abs=1e-5)
        for one, two in zip(found, expected, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)
    rounded, found = one_step(from_features, num_micro_batches=2, dtype=torch.bfloat16)
    assert rounded.loss == pytest.approx(result.loss, abs=0.05)
    assert all(gradient.isfinite().all() for gradient in found)


def test_before_its_epoch_a_method_is_the_conventional_one(shards, tmp_path):
    conventional = one_step(prepared(shards, tmp_path, "data.frame_features=own"))[0].loss
    words = ["data.frame_features=own", *METHODS["nearest"], "loss.frame_match_from_epoch=2"]
    run = prepared(shards, tmp_path, *words)
    assert [one_step(run, epoch=epoch)[0].loss == pytest.approx(conventional) for epoch in range(3)] == [1, 1, 0]


def test_the_lone_frame_is_the_one_that_is_drawn_alone(shards, tmp_path):
    steps = range(9)
    alone = list(prepared(shards, tmp_path).batches(steps))
    among = list(prepared(shards, tmp_path, "loss.frame_match=nearest").batches(steps))
    for one, every in zip(alone, among, strict=True):
        assert (one.frames_BLHWC.shape, every.frames_BLHWC.shape) == ((4, 1, 64, 64, 3), (4, 4, 64, 64, 3))
        assert every.frames_BLHWC.dtype == torch.uint8
        assert torch.equal(one.frames_BHWC, every.frames_BHWC)
        assert torch.equal(one.frame_numbers_BL[:, 0], every.lone_frame_B)
        assert every.frame_numbers_BL.tolist() == [[0, 1, 2, 3]] * 4
    drawn = {(key, int(frame)) for each in among for key, frame in zip(each.keys, each.lone_frame_B, strict=True)}
    assert len(drawn) > 12, "a clip has another frame in another epoch"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_before_its_epoch_a_method_decodes_the_lone_frame_alone(shards, tmp_path, num_workers):
    steps, method = range(7), ["loss.frame_match=nearest", f"data.num_workers={num_workers}"]
    alone = list(prepared(shards, tmp_path).batches(steps))
    among = list(prepared(shards, tmp_path, *method).batches(steps))
    found = list(prepared(shards, tmp_path, *method, "loss.frame_match_from_epoch=1").batches(steps))
    for step, (one, every, batch) in enumerate(zip(alone, among, found, strict=True)):
        expected = one if step < 3 else every
        assert torch.equal(batch.frames_BLHWC, expected.frames_BLHWC), step
        assert torch.equal(batch.frame_numbers_BL, expected.frame_numbers_BL), step
        assert torch.equal(batch.lone_frame_B, every.lone_frame_B), step
        assert torch.equal(batch.frames_BHWC, one.frames_BHWC), step


def test_a_clip_with_too_few_frames_is_no_sample_of_a_method_that_needs_them(tmp_path):
    samples = [make_sample(number, num_frames=3 if number == 5 else 4) for number in range(12)]
    folder = write_shards(tmp_path / "set", [samples])
    run = prepared(folder, tmp_path / "run", "loss.frame_match=nearest")
    batches = list(run.batches(range(3)))
    assert [(bad.key, bad.kind) for batch in batches for bad in batch.bad_samples] == [("clip-0005", "missing_member")]
    decode = run.recipe.data.decode_config(frames="all", frame_pixels=64, random=False)
    with pytest.raises(UserError, match=r"clip clip-0005 of .* cannot be evaluated \(it has no 3.jpg\)"):
        EvaluationBatches(load_shards(folder), decode, world=World(), batch_size=12)[0]


def test_a_run_begins_to_match_at_its_epoch_and_goes_on_after_a_stop(shards, tmp_path):
    words = [*METHODS["nearest"], "loss.frame_match_from_epoch=1", "data.frame_features=own", "training.resume=auto"]
    words += ["training.num_epochs=2", "data.validation={}"]
    train(shards, tmp_path / "whole", *words)
    for stop in (["training.max_steps=4"], []):
        train(shards, tmp_path / "parts", *words, *stop)
    whole, parts = (
        {int(line["trainer/step"]): line for line in read_metrics(tmp_path / name) if "train/loss" in line}
        for name in ("whole", "parts")
    )
    assert [step for step, line in whole.items() if "train/frame_0_share" in line] == list(range(4, 7))
    for step, line in whole.items():
        for name in ("train/loss", "train/frame_2_share", "optim/gradient_norm"):
            assert parts[step].get(name) == line.get(name), (step, name)


@pytest.mark.parametrize("words", [[], ["evaluation.frame=best"], METHODS["segments"]])
def test_retrieval_by_the_middle_frame_the_best_one_or_eq_4(shards, tmp_path, words):
    run = prepared(shards, tmp_path, *words)
    found = run.evaluate()[0].directions
    run.model.eval()
    decode = run.recipe.data.decode_config(frames="all", frame_pixels=64, random=False)
    batch = EvaluationBatches(run.validation_sets["own"], decode, world=World(), batch_size=12)[0]
    with torch.no_grad():
        audio_NLD = run.model.audio(batch.waveform_BS, batch.num_valid_samples_B)
        image_NLD = unit_length(run.model.image(batch.frames_BLHWC.flatten(0, 1))).unflatten(0, (12, 4))
    score = {
        0: lambda a, i: torch.cosine_similarity(a, i[2], dim=0),
        1: lambda a, i: torch.stack([torch.cosine_similarity(a, frame, dim=0) for frame in i]).max(),
        2: lambda a, i: torch.cosine_similarity(a.flatten(), i.flatten(), dim=0),
    }[min(len(words), 2)]
    scores = torch.tensor([[score(a, i) for i in image_NLD] for a in audio_NLD])
    for name, of_queries in (("audio->image", scores), ("image->audio", scores.T)):
        rank = 1 + (of_queries > of_queries.diagonal()[:, None]).sum(dim=1)
        for k in (1, 5, 10):
            assert found[name].metrics[f"R@{k}"] == pytest.approx((rank <= k).double().mean().item()), (name, k)
            assert found[name].chance[f"R@{k}"] == pytest.approx(k / 12)
    if not words:
        features = prepared(shards, tmp_path, "data.frame_features=own").evaluate()[0].directions
        assert features["audio->image"].metrics == found["audio->image"].metrics


def test_a_multiframe_run_goes_on_to_captions_and_shows_its_frames(shards, tmp_path, monkeypatch, capsys):
    run_dir, out = tmp_path / "multiframe", tmp_path / "out"
    words = [*METHODS["segments"], "data.frame_features=own", "training.num_epochs=1"]
    train(shards, run_dir, *words)
    weights = read_weights(str(run_dir))
    text = build_towers(read_recipe([*SMALL, "task=image-text", f"data.train.own.shards={shards}"])).text
    text_file = tmp_path / "text.safetensors"
    save_file({f"text.{name}": tensor for name, tensor in text.state_dict().items()}, text_file)

    def zero_shot(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", f"run={run_dir}", "task=audio-text", f"out={out}", *words])
        evaluate.main()

    monkeypatch.setattr(sys, "argv", ["evaluate.py", f"run={run_dir}", "evaluation.batch_size=2"])
    with pytest.raises(UserError, match="give out=FOLDER for the results"):
        evaluate.main()
    with pytest.raises(UserError, match=r"has no text tower for task=audio-text: give model.text.init"):
        zero_shot()
    zero_shot(f"model.text.init={text_file}")
    found = json.loads((out / "retrieval.json").read_text())[0]["directions"]["audio->text"]["metrics"]
    words = ["task=audio-text", f"model.audio.init={run_dir}", "model.audio.num_outputs=4"]
    words += [f"model.text.init={text_file}"]
    tuned = prepared(shards, tmp_path / "tuned", *words)
    assert tuned.evaluate()[0].directions["audio->text"].metrics == found
    monkeypatch.setattr(sys, "argv", ["frames.py", f"run={run_dir}", f"out={tmp_path / 'frames.png'}", "clips=3"])
    frames.main()
    assert "3 clips, nearest frame 0: " in capsys.readouterr().out
    assert (tmp_path / "frames.png").stat().st_size > 1000
    whole = prepared(shards, tmp_path / "whole", "task=audio-text", f"model.audio.init={run_dir}")
    for name, tensor in whole.model.audio.state_dict().items():
        assert torch.equal(tensor, weights[f"audio.{name}"]), name
    assert not np.isnan(one_step(whole)[0].loss)


def test_what_the_nearest_frames_show_is_counted_by_kind(tmp_path, monkeypatch):
    config = SoundscapeConfig(media=str(tmp_path), num_clips=3)
    assert len(list(records(config, 1))) == 3
    plans = [script(config, number) for number in range(3)]
    batches = [SimpleNamespace(metadata=[SimpleNamespace(name=plan.name)]) for plan in plans]
    chosen = iter([0, 2, 3])
    monkeypatch.setattr(frames, "frame_cosines", lambda _model, _batch: np.eye(4)[[next(chosen)]])
    found = frames.nearest_kinds(None, batches, str(tmp_path))
    shown = [plan.kinds_shown() for plan in plans]
    nearest = [shown[0][0], shown[1][2], shown[2][3]]
    assert found == {
        kind: (nearest.count(kind) / 3, sum(kinds.count(kind) for kinds in shown) / 12)
        for kind in sorted({kind for kinds in shown for kind in kinds})
    }
