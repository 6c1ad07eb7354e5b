"""The full-size chain's benchmark, with towers of two layers: it is the proof that those recipes take both steps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.faults
def test_the_chain_of_the_full_size_recipes_runs():
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.bench_correspondences", "2", "tiny"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    stages = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("| ")]
    assert stages == ["stage", "stage1", "embed", "self"]
