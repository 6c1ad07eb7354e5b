"""Stage 2: runs that learn from what other runs said of every clip and caption, on one process and on two."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from audiotext_dist.data.decode import decode_clip
from audiotext_dist.data.plan import Slot
from audiotext_dist.data.shard import Shard, load_shards
from audiotext_dist.data.shard_reader import ShardReader
from audiotext_dist.distributed import World
from audiotext_dist.errors import UserError
from audiotext_dist.losses.config import LossConfig
from audiotext_dist.losses.contrastive import Teachers, contrastive_loss
from audiotext_dist.models.dual_encoder import DualEncoder, build_model
from audiotext_dist.training.prepare import Prepared, prepare
from audiotext_dist.training.recipe import read_recipe, read_run_recipe
from audiotext_dist.training.weights import load_model
from launch import embed
from tests.clips import make_sample, write_shards
from tests.ranks import run_on_ranks
from tests.training.runs import SMALL, Fault, Ran, train_many, train_with_faults, write_training_set

NUM_STEPS = 3
# No random crop and no masks: a student then says of a clip what its teacher said.
AS_EMBEDDED = ["model.audio.fbank.time_mask_frames=0", "model.audio.fbank.freq_mask_bins=0"]
FIXED_TEMPERATURE = ["model.learn_temperature=false", "model.init_temperature=0.05"]
OF_WINDOWS = ["model.audio.stride_bins=16", "model.audio.window_seconds=0.5", "training.seed=1"]
STAGE_2 = ["loss.pair_weight=0", "loss.teacher_weight=1", *FIXED_TEMPERATURE, *AS_EMBEDDED]


def teachers(folder: Path, *names: str) -> str:
    return f"data.teachers={{{', '.join(f'{name}: {folder / name}' for name in names)}}}"


def stage_2(folder: Path, run: str, names: Sequence[str], *words: str) -> tuple[list[str], list[Fault]]:
    """A run that starts as the first of its teachers."""
    train = f"data.train.own.shards={folder / 'train'}"
    given = [*STAGE_2, train, teachers(folder, *names), f"model.init={folder / names[0]}", f"run_dir={folder / run}"]
    return [*given, *words], []


def in_two_stages(rank: int, folder: Path) -> dict[str, Ran]:
    """Two teachers of different towers, what they say of the training set, and runs that learn from one and both."""
    train = f"data.train.own.shards={write_training_set(folder / 'train')}"
    for name, words in (("one", []), ("two", OF_WINDOWS)):
        train_with_faults(rank, [train, f"run_dir={folder / name}", "training.max_steps=1", *FIXED_TEMPERATURE, *words])
        embedded(folder / "train", folder / name, name)
    ran = train_many(
        rank,
        [
            stage_2(folder, "self", ["one"], "training.max_steps=1"),
            stage_2(folder, "both", ["one", "two"], f"training.max_steps={NUM_STEPS}"),
        ],
    )
    return dict(zip(("self", "both"), ran, strict=True))


def stopped_with_micro_batches(rank: int, folder: Path) -> Ran:
    """The same run by both teachers on more ranks, in micro-batches, stopped and gone on with."""
    parts = [["training.max_steps=1"], [f"training.max_steps={NUM_STEPS}"]]
    runs = [stage_2(folder, "ranks", ["one", "two"], "training.micro_batch_size=3", *part) for part in parts]
    return train_many(rank, runs)[-1]


def embedded(shards: Path, run: Path, name: str, *words: str) -> None:
    argv = ["embed.py", f"run={run}", f"shards={shards}", f"features={name}", "data.num_workers=0", *words]
    with mock.patch.object(sys, "argv", argv):
        embed.main()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stages")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Ran]:
    return run_on_ranks(in_two_stages, 1, folder)[0]


def test_losses_are_the_same_on_two_processes_in_micro_batches_and_after_a_stop(
    folder: Path, alone: dict[str, Ran]
) -> None:
    on_ranks = run_on_ranks(stopped_with_micro_batches, 2, folder)[0]
    assert list(on_ranks.losses) == list(range(1, NUM_STEPS + 1))
    assert on_ranks.losses == pytest.approx(alone["both"].losses, rel=1e-5)


def test_self_distillation_begins_at_the_entropy_of_its_targets(alone: dict[str, Ran]) -> None:
    first = alone["self"].metrics[0]
    assert first["train/loss"] == pytest.approx(first["train/teacher_entropy"], rel=1e-5)
    assert first["train/teacher_kl"] == pytest.approx(0, abs=1e-5)
    assert 0.1 < first["train/teacher_entropy"] < np.log(12)


def prepared(folder: Path, *words: str) -> Prepared:
    given = [f"data.train.own.shards={folder / 'train'}", f"run_dir={folder / 'prepared'}", *STAGE_2, *words]
    return prepare(read_recipe([*SMALL, *given]), World())


def test_a_batch_has_the_teachers_mean_cosine_of_its_clips_and_drawn_captions(
    folder: Path, alone: dict[str, Ran]
) -> None:
    run = prepared(folder, teachers(folder, "one", "two"))
    shards = load_shards(str(folder / "train"))
    drawn = set()
    for batch in run.batches(range(4)):
        said = [naively_said(folder / name, shards, batch.keys, batch.captions) for name in ("one", "two")]
        expected = torch.stack([functional.normalize(a) @ functional.normalize(t).T for a, t in said]).mean(dim=0)
        assert batch.teacher_audio_BE is not None
        assert batch.teacher_captions_BE is not None
        torch.testing.assert_close(batch.teacher_audio_BE @ batch.teacher_captions_BE.T, expected, atol=1e-5, rtol=0)
        drawn |= {caption.split()[0] for caption in batch.captions}
    assert expected.std() > 1e-3
    assert drawn == {"sound", "tone"}


@torch.no_grad()
def naively_said(
    run: Path, shards: Sequence[Shard], keys: Sequence[str], captions: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Audio and caption embeddings straight from a run's checkpoint."""
    recipe = read_run_recipe(run)
    model = build_model(recipe.model.without_weights(), recipe.task, recipe.data.sample_rate_hz)
    load_model(model, str(run))
    model.eval()
    return audio_of(model, shards, keys), model.embed_text(model.text.tokenize(list(captions)))


def audio_of(model: DualEncoder, shards: Sequence[Shard], keys: Sequence[str]) -> torch.Tensor:
    reader = ShardReader(shards)
    decode = read_recipe([*SMALL, "data.train.own.shards=x"]).data.decode_config(
        frames="none", frame_pixels=0, random=False
    )
    places = {key: (number, row) for number, shard in enumerate(shards) for row, key in enumerate(shard.index.keys)}
    clips = [decode_clip(reader, key, Slot(*places[key]), decode, seed=0, epoch=0) for key in keys]
    waveform_NS = torch.from_numpy(np.stack([clip.waveform for clip in clips]))
    return model.embed_audio(waveform_NS, torch.tensor([clip.num_valid_samples for clip in clips]))


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 9), st.integers(1, 5), st.floats(0.02, 1.0), st.integers(0, 2**32), st.integers(1, 3))
def test_a_student_that_is_its_teacher_has_the_entropy_as_loss_and_no_gradient(
    num_rows: int, dim: int, temperature: float, seed: int, num_teachers: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    a_nD, t_nD = (
        functional.normalize(torch.randn(num_rows, dim, generator=draw, dtype=torch.float64)).requires_grad_()
        for _ in "at"
    )
    # As many teachers that are all the student itself are one.
    joined = Teachers(*((side.repeat(1, num_teachers) / num_teachers**0.5).detach() for side in (a_nD, t_nD)))
    config = LossConfig(pair_weight=0, teacher_weight=1, teacher_temperature=temperature)
    scale = torch.tensor([1 / temperature], dtype=torch.float64)
    found = contrastive_loss(a_nD, t_nD, scale, config, teachers=joined)
    found.loss.backward()
    z = (a_nD @ t_nD.T / temperature).detach()
    entropy = sum(torch.distributions.Categorical(logits=side).entropy().mean() for side in (z, z.T)) / 2
    assert found.loss.item() == pytest.approx(float(entropy), abs=1e-9)
    for side in (a_nD, t_nD):
        assert side.grad.abs().max() < 1e-9 / temperature


def another_checkpoint(folder: Path) -> None:
    shutil.rmtree(folder / "one")
    shutil.copytree(folder / "two", folder / "one")


def other_captions(folder: Path) -> None:
    write_shards(folder / "train", [[make_sample(row, captions=["another", "caption"]) for row in range(12)]])


def a_missing_file(folder: Path) -> None:
    (folder / "train" / "00002.one.safetensors").unlink()


def audio_alone(folder: Path) -> None:
    embedded(folder / "train", folder / "one", "one", "what=[audio]", "overwrite=true")


def less_of_a_clip(folder: Path) -> None:
    embedded(folder / "train", folder / "one", "one", "data.clip_seconds=0.5", "overwrite=true")


def two_encoders(folder: Path) -> None:
    shutil.copy(folder / "train" / "00002.two.safetensors", folder / "train" / "00002.one.safetensors")


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        (another_checkpoint, [], "00000.one.safetensors was made"),
        (other_captions, [], "00000.one.safetensors was made of another content of 00000.tar"),
        (a_missing_file, [], "data set 'own' has no 'one' features for 1 of 4 shards"),
        (audio_alone, [], "00000.one.safetensors was made without text"),
        (
            audio_alone,
            ["data.teachers={one: null}"],
            "00000.one.safetensors is of audio: make the features of data.teachers.one",
        ),
        (less_of_a_clip, [], "00000.one.safetensors was made with clip_seconds=0.5, not 1.0"),
        (two_encoders, ["data.teachers={one: null}"], "00002.one.safetensors was made with stride_bins=16, not 32"),
        (None, ["data.teachers={three: null}"], "has no 'three' features for 4 of 4 shards"),
        (None, ["data.teachers={one: /nowhere}"], "/nowhere is no run folder"),
        (None, ["data.teachers={}"], "loss.teacher_weight=1 needs teachers"),
        (
            None,
            ["loss.teacher_weight=0", "loss.pair_weight=1"],
            "data.teachers says nothing with loss.teacher_weight=0",
        ),
        (None, ["task=audio-image"], "data.teachers are of audio and captions, not of task=audio-image"),
        (None, ["data.teachers={a.b: null}"], "data.teachers=a.b cannot be part of a file's name"),
    ],
)
def test_what_is_no_teacher_is_refused_before_training(
    folder: Path,
    alone: dict[str, Ran],
    tmp_path: Path,
    change: Callable[[Path], None] | None,
    words: list[str],
    message: str,
) -> None:
    for name in ("train", "one", "two"):
        shutil.copytree(folder / name, tmp_path / name)
    if change is not None:
        change(tmp_path)
    with pytest.raises(UserError) as raised:
        prepared(tmp_path, teachers(tmp_path, "one", "two"), *words)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_teachers_whose_run_is_not_named_are_taken_as_they_are(
    folder: Path, alone: dict[str, Ran], tmp_path: Path
) -> None:
    shutil.copytree(folder / "train", tmp_path / "train")
    run = prepared(tmp_path, "data.teachers={one: null, two: null}")
    assert len(run.train_features.teachers) == 2


def test_a_teacher_of_windows_hears_as_much_of_a_clip_as_it_was_told(
    folder: Path, alone: dict[str, Ran], tmp_path: Path
) -> None:
    shutil.copytree(folder / "train", tmp_path / "train")
    embedded(tmp_path / "train", folder / "two", "two", "data.clip_seconds=0.5", "overwrite=true")
    with pytest.raises(UserError, match=r"00000.two.safetensors was made with clip_seconds=0.5, not 1.0"):
        prepared(tmp_path, f"data.teachers={{two: {folder / 'two'}}}")
    embedded(tmp_path / "train", folder / "two", "two", "data.clip_seconds=3", "overwrite=true")
    run = prepared(tmp_path, f"data.teachers={{two: {folder / 'two'}}}")
    assert len(run.train_features.teachers) == 1
    shutil.copy(folder / "train" / "00001.two.safetensors", tmp_path / "train")
    with pytest.raises(UserError, match=r"00001.two.safetensors was made with clip_seconds=1.0, not 3.0"):
        prepared(tmp_path, f"data.teachers={{two: {folder / 'two'}}}")
