"""Runs under the real launcher that are met in the middle of it, by signals and kills."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from audiotext_dist.training.tracker import METRICS_FILE
from tests.ranks import free_port
from tests.training.runs import SMALL

REPOSITORY = Path(__file__).parents[2]
DEEPSPEED = ("-m", "deepspeed.launcher.runner")
WRAPPER = ("-m", "launch.run")
_LIMIT_SECONDS = 240


@dataclass(kw_only=True)
class Launched:
    """A run in the background. command: the process that a user started."""

    command: subprocess.Popen[str]
    run_dir: Path
    output: Path
    num_processes: int

    def wait_for_step(self, step: int) -> None:
        """Until so many steps are logged."""
        metrics = self.run_dir / METRICS_FILE
        while not (metrics.exists() and len(metrics.read_text().splitlines()) >= step):
            assert self.command.poll() is None, self.said()
            time.sleep(0.02)

    def wait_for_watching_ranks(self) -> None:
        """Until every rank looks at its launchers, which is long before its first step."""
        until = time.monotonic() + _LIMIT_SECONDS
        while not (ranks := self._ranks_if_any()) or not all(map(_watches, ranks)):
            assert self.command.poll() is None, self.said()
            assert time.monotonic() < until, self.said()
            time.sleep(0.02)

    def launcher(self) -> psutil.Process:
        """DeepSpeed's inner launcher, the parent of the ranks."""
        return next(each for each in self._below() if "deepspeed.launcher.launch" in _words(each))

    def ranks(self) -> list[psutil.Process]:
        """The ranks, without their workers."""
        return sorted(self.launcher().children(), key=lambda rank: rank.pid)

    def processes(self) -> list[psutil.Process]:
        """Everything that the command has started, and the command."""
        return [psutil.Process(self.command.pid), *self._below()]

    def said(self) -> str:
        """Both output streams so far."""
        return self.output.read_text(errors="replace")

    def _ranks_if_any(self) -> list[psutil.Process]:
        with contextlib.suppress(StopIteration, psutil.Error):
            ranks = self.ranks()
            return ranks if len(ranks) == self.num_processes else []
        return []

    def _below(self) -> list[psutil.Process]:
        return psutil.Process(self.command.pid).children(recursive=True)


@contextlib.contextmanager
def launched(
    run_dir: Path,
    *words: str,
    launcher: Sequence[str] = DEEPSPEED,
    options: Sequence[str] = (),
    num_processes: int = 2,
    inside: Sequence[str] = (),
    variables: Mapping[str, str] = {},
) -> Iterator[Launched]:
    """Start a run; what is left of it at the end is killed. inside: a command that runs the command it is given."""
    output = Path(tempfile.mkstemp(suffix=".log")[1])
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "RANK", "WORLD"))}
    options = options or ["--num_accelerators", str(num_processes), "--master_port", str(free_port())]
    with output.open("w") as log:
        command = subprocess.Popen(
            [*inside, sys.executable, *launcher, *options, "launch/pretrain.py", *SMALL, f"run_dir={run_dir}", *words],
            cwd=REPOSITORY,
            env={**environment, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY), **variables},
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )
    seen: set[psutil.Process] = set()
    run = Launched(command=command, run_dir=run_dir, output=output, num_processes=num_processes)
    try:
        yield run
    finally:
        with contextlib.suppress(psutil.Error):
            seen.update(run.processes())
        for process in seen:
            with contextlib.suppress(psutil.Error):
                process.kill()
        command.wait()
        output.unlink()


def wait_for_all(processes: Sequence[psutil.Process]) -> None:
    """Until none of them lives."""
    _, alive = psutil.wait_procs(processes, timeout=_LIMIT_SECONDS)
    assert not alive, alive


def send(process: psutil.Process, number: signal.Signals) -> None:
    """The signal, to this process alone."""
    process.send_signal(number)


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _watches(rank: psutil.Process) -> bool:
    with contextlib.suppress(OSError):
        return any("pidfd" in str(file.readlink()) for file in Path(f"/proc/{rank.pid}/fd").iterdir())
    return False
