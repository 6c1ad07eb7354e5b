"""kill -9 at any moment, during saves too: every loss is that of the run that was left alone, to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from audiotext_dist.training.tracker import read_metrics
from tests.training.runs import SMALL, write_training_set

REPOSITORY = Path(__file__).parents[2]
NUM_STEPS = 200


def losses_after_kills(folder: Path, name: str, num_kills: int, *words: str) -> tuple[dict[str, int], dict[int, float]]:
    done = subprocess.run(
        [
            *[sys.executable, "-m", "tests.training.killed_runs", "7", str(num_kills), *SMALL],
            *[f"data.train.own.shards={folder / 'train'}", f"run_dir={folder / name}"],
            *["data.num_workers=1", "training.num_epochs=1000", f"training.max_steps={NUM_STEPS}"],
            *["optim.weight_lr=3e-4", "checkpoint.every_steps=1", *words],
        ],
        cwd=REPOSITORY,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    lines = read_metrics(folder / name)
    return found, {int(line["trainer/step"]): line["train/loss"] for line in lines if "train/loss" in line}


@pytest.mark.faults
@pytest.mark.parametrize("zero_stage", [0, 1])
def test_twenty_five_kills(tmp_path: Path, zero_stage: int) -> None:
    write_training_set(tmp_path / "train")
    word = f"engine.zero_stage={zero_stage}"
    # Saved once, so that nothing but the kills differs.
    _, whole = losses_after_kills(tmp_path, "whole", 0, word, f"checkpoint.every_steps={NUM_STEPS}")
    kills, found = losses_after_kills(tmp_path, "killed", 25, word)
    print(f"ZeRO {zero_stage}: {kills['killed']} kills, {kills['during_saves']} of them left half a checkpoint")
    assert list(whole) == list(range(1, NUM_STEPS + 1))
    assert kills["during_saves"] > 0
    assert found == whole
