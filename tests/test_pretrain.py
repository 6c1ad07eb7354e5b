"""The main job on two ranks: resume, ZeRO, towers, and what goes wrong. test_two_nodes.py starts it by the launcher."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from audiotext_dist.data.shard import load_shards
from audiotext_dist.training.recipe import read_run_recipe
from audiotext_dist.training.tracker import read_metrics
from audiotext_dist.training.weights import read_weights
from launch.dashboard import described
from tests.clips import SAMPLE_RATE_HZ, make_sample, write_shards
from tests.commands import run_commands
from tests.ranks import run_command_on_ranks
from tests.wandb_file import history

REPOSITORY = Path(__file__).parents[1]
NUM_STEPS = 20
SMALL = [
    "name=test",
    f"data.sample_rate_hz={SAMPLE_RATE_HZ}",
    "data.clip_seconds=1.0",
    "data.num_workers=1",
    "model.audio.name=tiny-audio-32",
    "model.audio.stride_frames=32",
    "model.audio.stride_bins=32",
    "model.audio.fbank.num_fbank_frames=98",
    "model.audio.fbank.time_mask_frames=20",
    "model.image.name=tiny-64",
    "model.text.name=tiny-64",
    "model.text.frozen=false",
    "training.global_batch_size=16",
    "training.num_epochs=10",
    "optim.weight_lr=3e-3",
    f"training.max_steps={NUM_STEPS}",
    "evaluation.every_epochs=100",
    "checkpoint.every_epochs=100",
    "checkpoint.every_steps=10",
    "tracker.every_steps=1",
    "tracker.wandb=disabled",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain")
    train = [[make_sample(16 * shard + row) for row in range(16)] for shard in range(4)]
    write_shards(folder / "train", train)
    write_shards(folder / "validation", [train[0][:12]])
    return folder


def pretrain(folder: Path, run: str, *words: str, num_processes: int = 2) -> Path:
    """A finished run's folder."""
    sets = [f"data.train.own.shards={folder / 'train'}", f"data.validation.own.shards={folder / 'validation'}"]
    done = run_command_on_ranks("pretrain", [*SMALL, *sets, f"run_dir={folder / run}", *words], num_processes)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / run


def losses(run: Path) -> dict[int, float]:
    return {int(line["trainer/step"]): line["train/loss"] for line in read_metrics(run) if "train/loss" in line}


def learned(found: dict[int, float]) -> bool:
    """The last five losses lie below the first five."""
    values = list(found.values())
    return max(values[-5:]) < min(values[:5])


@pytest.fixture(scope="module")
def two_processes(folder):
    words = ["tracker.wandb=offline", "evaluation.num_examples=4", "data.validation.own.relevance=labels"]
    return pretrain(folder, "two", *words)


def test_an_offline_run_shows_what_the_metrics_file_says_and_the_examples(two_processes):
    logged = [
        {name: value for name, value in line.items() if not name.startswith("_")} for line in history(two_processes)
    ]
    assert [line for line in logged if "examples/own/sheet/_type" not in line] == read_metrics(two_processes)
    steps = [line for line in logged if "train/loss" in line]
    told = {name.rpartition("/")[2] for name in steps[-1]}
    assert told >= {
        *("loss", "pair_loss", "logit_scale", "recall_at_1", "reverse_recall_at_1", "positive_cosine"),
        *("negative_cosine", "positives_a_row", "gradient_norm", "weight_lr", "bias_lr", "clips_per_second"),
        *("waiting_share_min", "waiting_share_max", "resident_bytes"),
    }
    (shown,) = (line for line in logged if "examples/own/sheet/_type" in line)
    assert (shown["trainer/step"], shown["examples/own/queries/nrows"]) == (NUM_STEPS, 4)
    (offline,) = two_processes.glob("wandb/offline-run-*")
    assert (offline / "files" / shown["examples/own/sheet/path"]).stat().st_size > 10_000
    # The table's sounds and spectrograms wait for their upload in the run folder too.
    waiting = [file.read_bytes() for file in two_processes.glob("wandb/artifacts/staging/*")]
    (table,) = map(json.loads, {content for content in waiting if content.startswith(b"{")})
    kinds = [cell["_type"] for row in table["data"] for cell in row if isinstance(cell, dict)]
    assert (kinds.count("audio-file"), kinds.count("image-file")) == (4, 4)
    queries = json.loads((two_processes / "examples" / "own" / "queries.json").read_text())
    assert [row[table["columns"].index("query")] for row in table["data"]] == [each["query"] for each in queries]


# Shown for other losses, fp16 or a GPU; and logged, but not shown.
ELSEWHERE = re.compile("train/(recording_loss|teacher_.*|frame_._share)|optim/loss_scale|memory/device_.*")
NOT_SHOWN = re.compile("trainer/step|train/epoch|validation/.*/R@5")


def workspace_against_log(run: Path) -> tuple[set[str], set[str]]:
    """Lines of the run's workspace that it does not log, and what it logs that the workspace has not."""
    shown = {line for panels in described(read_run_recipe(run)).values() for panel in panels for line in panel["y"]}
    logged = set().union(*read_metrics(run))
    return (
        {name for name in shown - logged if not ELSEWHERE.fullmatch(name)},
        {name for name in logged - shown if not NOT_SHOWN.fullmatch(name)},
    )


def test_the_workspace_shows_what_a_run_logs(two_processes):
    of_lars = {"optim/trust_ratio_min", "optim/trust_ratio_median", "optim/trust_ratio_max"}
    assert workspace_against_log(two_processes) == (of_lars, set())


def test_two_processes_and_one_in_micro_batches_have_the_same_losses(folder, two_processes):
    alone = losses(pretrain(folder, "one", "training.micro_batch_size=4", num_processes=1))
    assert list(alone) == list(range(1, NUM_STEPS + 1))
    assert losses(two_processes) == pytest.approx(alone, rel=1e-4)
    assert learned(alone)


def test_a_resumed_run_goes_on_as_if_never_stopped(folder, two_processes):
    run = "resumed"
    pretrain(folder, run, "training.resume=auto", "training.max_steps=13", "checkpoint.every_steps=5")
    # The newest checkpoint, of step 13, is damaged: the one before it counts, and later lines are cut.
    damaged = folder / run / "checkpoints" / "step-00000013" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x01")
    assert losses(pretrain(folder, run, "training.resume=auto")) == losses(two_processes)
    assert [path.name for path in sorted((folder / run / "checkpoints").glob("step-*"))][-1] == "step-00000020"


def test_a_resumed_run_takes_its_rates_from_its_own_recipe(folder, two_processes):
    run = folder / "slower"
    shutil.copytree(two_processes, run)
    words = ["training.resume=auto", "training.max_steps=22", "optim.weight_lr=1e-5", f"run_dir={run}"]
    done = run_command_on_ranks("pretrain", [*SMALL, f"data.train.own.shards={folder / 'train'}", *words], 2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert max(line["optim/weight_lr"] for line in read_metrics(run)[-2:]) < 1e-5


def test_a_clip_that_only_rank_1_cannot_evaluate_is_named(folder):
    broken = folder / "broken"
    write_shards(broken, [[make_sample(row) for row in range(12)]])
    path = broken / "00000.tar"
    offset, num_bytes = load_shards(str(broken))[0].index.span(1, "flac")
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * num_bytes)
    sets = [f"data.train.own.shards={folder / 'train'}", f"data.validation.own.shards={broken}"]
    words = [*SMALL, *sets, f"run_dir={folder / 'rank1'}", "training.max_steps=1"]
    done = run_command_on_ranks("pretrain", words, 2)
    assert done.returncode != 0
    assert "clip-0001 of" in "".join(line for line in done.stderr.splitlines() if line.startswith("error:"))


def test_a_clip_that_does_not_decode_is_replaced_counted_and_named_once(folder):
    broken = folder / "broken-train"
    samples = [make_sample(row) for row in range(32)]
    samples[7] = dataclasses.replace(samples[7], flac=b"no flac")
    write_shards(broken, [samples[:16], samples[16:]])
    sets = [f"data.train.own.shards={broken}", "data.validation={}", f"run_dir={folder / 'replaced'}"]
    done = run_command_on_ranks("pretrain", [*SMALL, *sets, "training.max_steps=6", "tracker.every_steps=2"], 2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("replaced clip-0007 of") == 1, done.stderr[-2000:]
    counts = [line["data/bad_samples"] for line in read_metrics(folder / "replaced")]
    assert counts == [1, 2, 3]
    assert read_metrics(folder / "replaced")[-1]["data/bad_samples/broken_audio"] == 3
    words = [*SMALL, *sets, f"run_dir={folder / 'stopped'}", "data.max_bad_share=0"]
    stopped = run_command_on_ranks("pretrain", words, 2)
    assert stopped.returncode != 0
    assert "1 of " in stopped.stderr
    assert "more than data.max_bad_share=0.0 (1 broken_audio)" in stopped.stderr


def test_a_run_that_diverges_stops_and_leaves_no_broken_checkpoint(folder):
    sets = [f"data.train.own.shards={folder / 'train'}", "checkpoint.every_steps=1", "optim.weight_lr=1e30"]
    run = folder / "diverged"
    done = run_command_on_ranks("pretrain", [*SMALL, *sets, f"run_dir={run}", "tracker.wandb=offline"], 1)
    assert done.returncode != 0
    assert "lower optim.weight_lr" in done.stderr
    assert "Traceback" not in done.stderr
    for saved in (run / "checkpoints").glob("step-*"):
        assert all(tensor.isfinite().all() for tensor in load_file(saved / "model.safetensors").values())
    (offline,) = run.glob("wandb/offline-run-*")
    assert f"wandb sync {offline}\n" in done.stderr


def test_bf16_learns_in_another_precision(folder, two_processes):
    found = losses(pretrain(folder, "bf16", "training.precision=bf16"))
    whole = losses(two_processes)
    assert found[1] != whole[1]
    assert found[1] == pytest.approx(whole[1], rel=0.02)
    assert learned(found)


def test_audio_image_with_lars_leaves_the_image_tower_alone(folder):
    words = ["task=audio-image", "optim.name=lars", "optim.weight_lr=4.0", "optim.bias_lr=0.1"]
    run = pretrain(folder, "image", *words, "optim.lr_scales={audio.transformer.transformer: 0.5}")
    assert workspace_against_log(run) == (set(), set())
    first, last = (load_file(run / "checkpoints" / f"step-000000{step}" / "model.safetensors") for step in (10, 20))
    for name in first:
        assert torch.equal(first[name], last[name]) == name.startswith("image."), name
    directions = json.loads((run / "retrieval.json").read_text())[0]["directions"]
    assert list(directions) == ["audio->image", "image->audio"]
    steps = [line for line in read_metrics(run) if "train/loss" in line]
    assert all(0 < line[f"optim/trust_ratio_{name}"] < 1 for line in steps for name in ("min", "median", "max"))


def test_evaluation_and_export_agree_with_the_run(folder, two_processes):
    shown = json.loads((two_processes / "retrieval.json").read_text())
    export = run_command_on_ranks("export", [f"run={two_processes}", f"out={folder / 'export'}"], 1)
    assert "weights in" in export.stdout
    done = run_command_on_ranks("evaluate", [f"run={folder / 'export'}", f"out={folder / 'again'}"], 2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((folder / "again" / "retrieval.json").read_text()) == shown
    for each in (two_processes, folder / "again"):
        assert (each / "examples" / "own" / "queries.png").stat().st_size > 10_000
    asked, again = (
        [(one["clip"], one["number"]) for one in json.loads((each / "examples" / "own" / "queries.json").read_text())]
        for each in (two_processes, folder / "again")
    )
    assert asked == again
    assert "audio->text" in done.stdout
    assert (two_processes / "loss.png").stat().st_size > 1000


def test_a_tower_is_taken_from_another_run(folder, two_processes):
    words = ["task=audio-image", f"model.audio.init={two_processes}", "training.max_steps=1", "optim.weight_lr=0.0"]
    run = pretrain(folder, "initialised", *words, "optim.bias_lr=0.0", num_processes=1)
    taken, source = read_weights(str(run)), read_weights(str(two_processes))
    names = [name for name in source if name.startswith("audio.")]
    assert names
    assert all(torch.equal(taken[name], source[name]) for name in names)


def test_wrong_input_on_two_ranks_is_one_line(folder):
    words = [*SMALL, f"data.train.own.shards={folder / 'train'}", "optim.wieght_lr=1"]
    done = run_command_on_ranks("pretrain", words, 2)
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if line.startswith("error:")] == [
        "error: unknown key 'optim.wieght_lr': did you mean 'optim.weight_lr'?"
    ]
    assert "Traceback" not in done.stdout + done.stderr


def test_wrong_input_ends_before_any_process_group_starts(folder, two_processes):
    cases = [
        (["data.train.own.shards=/nowhere"], "data set 'own': no *.tar files at /nowhere"),
        (["training.global_batch_size=15"], "15 cannot be shared by 2 processes"),
        (["training.global_batch_size=100"], "an epoch holds 64 samples, fewer than one batch"),
        (["model.text.name=tiny-46"], "did you mean tiny-64"),
        (["model.audio.init=/nowhere"], "no weights at /nowhere"),
        ([f"run_dir={two_processes}"], "holds checkpoints of an earlier run"),
        (["run_dir=/proc/run"], "run_dir=/proc/run cannot be written to"),
        (
            [f"data.validation.own.shards={folder / 'train'}", "data.validation.own.relevance=/nowhere"],
            "no relevance file at /nowhere",
        ),
        (["task=image-text", "data.num_frames=9"], "has no 4.jpg"),
    ]
    commands = [("pretrain", [*SMALL, f"data.train.own.shards={folder / 'train'}", *words], None) for words, _ in cases]
    # No second process and no master address: starting a group would fail in another way, or hang.
    statuses, said = run_commands(commands, RANK="0", LOCAL_RANK="0", WORLD_SIZE="2")
    for (words, message), status, output in zip(cases, statuses, said, strict=True):
        errors = [line for line in output.splitlines() if line.startswith("error:")]
        assert (status, len(errors)) == (2, 1), (words, output)
        assert message in errors[0]
        assert "Traceback" not in output


@pytest.mark.parametrize("key", ["", "not-a-key"])
def test_wandb_without_a_good_key_is_offline_and_asks_nothing(tmp_path, key):
    program = (
        "from pathlib import Path; from audiotext_dist.training.tracker import Tracker, TrackerConfig\n"
        "tracker = Tracker(\n"
        "    TrackerConfig(), Path('.'), name='test', recipe={}, start_step=0, wandb_id=None, is_main=True\n"
        ")\n"
        "tracker.log(1, {'train/loss': 1.0}); tracker.close()"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**environment, "WANDB_API_KEY": key, "HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.DEVNULL,
        check=True,
        timeout=120,
    )
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
