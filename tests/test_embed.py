"""The command that embeds: kills, the launcher, and training and evaluation from what it wrote."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from audiotext_dist.data.feature_files import open_features
from audiotext_dist.data.features import FeatureReader
from audiotext_dist.data.sample import frame_member
from audiotext_dist.data.shard import load_shards
from audiotext_dist.evaluation.metrics import retrieval_metrics
from audiotext_dist.training.tracker import read_metrics
from tests.clips import SAMPLE_RATE_HZ, make_sample, write_shards
from tests.commands import REPOSITORY, run_commands
from tests.ranks import free_port

NUM_SHARDS, NUM_ROWS = 4, 16
PICTURES = [
    "name=test",
    "task=audio-image",
    f"data.sample_rate_hz={SAMPLE_RATE_HZ}",
    "data.clip_seconds=1.0",
    "data.num_workers=0",
    "model.audio.name=tiny-audio-32",
    "model.audio.stride_frames=32",
    "model.audio.stride_bins=32",
    "model.audio.fbank.num_fbank_frames=98",
    "model.audio.fbank.time_mask_frames=20",
    "model.image.name=tiny-64",
    "training.global_batch_size=16",
    "training.num_epochs=3",
    "optim.weight_lr=1e-3",
    "evaluation.every_epochs=3",
    "checkpoint.every_epochs=3",
    "tracker.every_steps=1",
    "tracker.wandb=disabled",
]


def copy_without_pictures(whole: Path, broken: Path) -> None:
    """The same shards, every byte of every JPEG damaged."""
    shutil.copytree(whole, broken)
    for shard in load_shards(str(broken)):
        path = Path(shard.path)
        path.chmod(0o644)
        with path.open("r+b") as file:
            for row in range(shard.index.num_samples):
                for frame in range(4):
                    offset, num_bytes = shard.index.span(row, frame_member(frame))
                    file.seek(offset)
                    file.write(b"\xff" * num_bytes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("embed")
    samples = [[make_sample(NUM_ROWS * shard + row) for row in range(NUM_ROWS)] for shard in range(NUM_SHARDS)]
    write_shards(folder / "whole", samples)
    copy_without_pictures(folder / "whole", folder / "broken")
    return folder


def sets(shards: Path, features: Path | None = None) -> list[str]:
    words = [f"data.{part}.own.shards={shards}" for part in ("train", "validation")]
    return words + [f"data.{part}.own.features={features}" for part in ("train", "validation") if features is not None]


@pytest.fixture(scope="module")
def said(folder) -> list[str]:
    """What each of these commands said, all run without a launcher."""
    whole, broken, features = folder / "whole", folder / "broken", folder / "features"
    embed = [*PICTURES, *sets(whole, features), "features=seen", "batch_size=8"]
    known = [*PICTURES, *sets(broken, features), "data.frame_features=seen"]
    commands = [
        ("pretrain", [*PICTURES, *sets(whole), f"run_dir={folder / 'pictures'}"], None),
        ("embed", embed, 2),
        ("embed", embed, None),
        ("pretrain", [*known, f"run_dir={folder / 'known-pictures'}"], None),
        ("evaluate", [f"run={folder / 'known-pictures'}", f"out={folder / 'again'}"], None),
        ("embed", [f"run={folder / 'pictures'}", f"shards={whole}", "features=teacher"], None),
    ]
    statuses, said = run_commands(commands)
    assert statuses == [-signal.SIGKILL if kill_at is not None else 0 for _, _, kill_at in commands], "\n".join(said)
    return said


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run) if "train/loss" in line]


def test_training_from_features_has_the_losses_and_the_retrieval_of_training_without(folder, said):
    own, known = folder / "pictures", folder / "known-pictures"
    assert len(losses(own)) == 12
    assert losses(known) == pytest.approx(losses(own), rel=1e-5)
    assert json.loads((known / "retrieval.json").read_text()) == json.loads((own / "retrieval.json").read_text())


def test_evaluation_reads_the_features_that_the_run_read(folder, said):
    again, shown = (json.loads((folder / name / "retrieval.json").read_text()) for name in ("again", "known-pictures"))
    assert again == shown


def test_a_job_that_was_killed_goes_on_where_it_was(folder, said):
    assert "made 2 files, 0 clips could not be embedded; 2 files were there already" in said[2]
    names = sorted(path.name for path in (folder / "features").iterdir())
    assert names == [f"{shard:05d}.seen.safetensors" for shard in range(NUM_SHARDS)]


def test_a_run_is_a_teacher_with_both_its_towers(folder, said):
    shards = load_shards(str(folder / "whole"))
    files = open_features(shards, "teacher", None, {}, "own")
    sounds, frames = (FeatureReader(files, modality) for modality in ("audio", "image"))
    slots = [(shard, row) for shard in range(NUM_SHARDS) for row in range(NUM_ROWS)]
    sound_ND = np.concatenate([sounds.read(*slot) for slot in slots])
    middle_ND = np.stack([frames.read(*slot)[2] for slot in slots])
    shown = json.loads((folder / "pictures" / "retrieval.json").read_text())[0]["directions"]["audio->image"]
    own_pairs = list(np.arange(len(slots))[:, None])
    assert shown["metrics"] == pytest.approx(retrieval_metrics(sound_ND, middle_ND, own_pairs))


def test_two_ranks_of_the_launcher_make_the_files_of_one_process(folder, said):
    out = folder / "two"
    words = [*PICTURES, f"shards={folder / 'whole'}", f"out={out}", "features=seen", "batch_size=8"]
    deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]
    launched = subprocess.run(
        [*deepspeed, "--master_port", str(free_port()), "launch/embed.py", *words],
        cwd=REPOSITORY,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert launched.returncode == 0, launched.stderr[-2000:]
    assert [f"rank {rank} of 2 made 2 files" in launched.stdout for rank in range(2)] == [True, True]
    made, alone = ({file.name: file.read_bytes() for file in place.iterdir()} for place in (out, folder / "features"))
    assert made == alone
