"""Kill a run of two ranks at random moments, and start it again each time, until it is through.

``python -m tests.training.killed_runs SEED NUM_KILLS key=value ...`` prints how many kills met a run, and how many of
them left a checkpoint half written. The ranks are forked from this process, which has imported everything: a start
costs a second instead of ten, so more kills meet training.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from audiotext_dist.errors import run_for_people
from audiotext_dist.training.tracker import METRICS_FILE
from launch import pretrain
from tests.ranks import free_port


def main(seed: int, num_kills: int, words: list[str]) -> dict[str, Any]:
    """Kills until there were so many; then the run is left alone to its end."""
    random.seed(seed)
    run_dir = Path(next(word.removeprefix("run_dir=") for word in words if word.startswith("run_dir=")))
    killed = during_saves = 0
    while killed < num_kills:
        left_before = half_written(run_dir)
        ranks = start(words)
        # One in four meets the start or the resume, the others training and saving.
        if random.random() < 0.75:
            before = num_lines(run_dir)
            wait(ranks, lambda before=before: num_lines(run_dir) != before)
        deadline = time.monotonic() + random.uniform(0.0, 1.0)
        wait(ranks, lambda deadline=deadline: time.monotonic() > deadline)
        if alive(ranks) < 2:
            raise SystemExit(f"the run ended after {killed} kills: give it more steps")
        victims = random.choice([ranks, ranks[:1], ranks[1:]])
        for rank in victims:
            os.kill(rank, signal.SIGKILL)
        killed += 1
        # What an earlier kill left may lie there still, where this one came before the run could clear it.
        during_saves += bool(half_written(run_dir) - left_before)
        # As the launcher does where one rank is gone.
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(rank, 0)
    codes = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in start(words)]
    if codes != [0, 0]:
        raise SystemExit(f"the last start ended with {codes}")
    return {"killed": killed, "during_saves": during_saves}


def wait(ranks: list[int], until: Callable[[], bool]) -> None:
    """Until then, or until a rank has ended."""
    while alive(ranks) == 2 and not until():
        time.sleep(0.001)


def half_written(run_dir: Path) -> set[str]:
    """The checkpoints that have no name yet. One that is half written twice in a row counts once."""
    return {path.name for path in run_dir.glob("checkpoints/.step-*.partial")}


def num_lines(run_dir: Path) -> int:
    """Of the metrics: steps that are logged."""
    metrics = run_dir / METRICS_FILE
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def start(words: list[str]) -> list[int]:
    """Two forked ranks, each in a process group of its own."""
    port = free_port()
    return [fork(rank, port, words) for rank in (0, 1)]


def fork(rank: int, port: int, words: list[str]) -> int:
    """A child that is this rank."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setpgid(0, 0)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_SIZE="2")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        sys.argv = ["pretrain.py", *words]
        run_for_people(pretrain.main)
        code = 0
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    finally:
        os._exit(code)


def alive(ranks: list[int]) -> int:
    """How many still run; the ended ones stay to be waited for."""
    return sum(os.waitid(os.P_PID, rank, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None for rank in ranks)


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])))
