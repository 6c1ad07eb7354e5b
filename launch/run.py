"""``deepspeed`` for a cluster that takes nodes back: ``python -m launch.run OPTIONS launch/pretrain.py recipe=...``.

SIGTERM or SIGUSR1 to this command reaches the ranks, and only them: they write a checkpoint, and their exit code, 75,
is this command's as well. So it is where the launcher was killed, which the ranks notice. When this command ends no
process of the run is left. (The ``deepspeed`` command itself dies of the signal; its ranks write their checkpoint, but
its exit code is that of the signal.)
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from typing import Any

import psutil

from audiotext_dist.training.preemption import EXIT_PREEMPTED, SECONDS_AFTER_LAUNCHER, WRAPPER_VARIABLE, this_process

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def main(words: list[str]) -> int:
    """Run ``deepspeed`` with these words; its exit code."""
    if words[:1] in (["-h"], ["--help"]):
        print(f"{(__doc__ or '').strip()}\n\nOPTIONS are those of deepspeed:\n", flush=True)
    asked = threading.Event()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda *_: asked.set())
    # Ranks whose launcher was killed become this process's children, so that it hears what they ended with.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    run = subprocess.Popen(
        [sys.executable, "-m", "deepspeed.launcher.runner", *words],
        env={**os.environ, WRAPPER_VARIABLE: this_process()},
        # A group of its own, so that a signal to this one's group comes once, through here.
        start_new_session=True,
        preexec_fn=_in_launcher,
    )
    code, ranks = _wait(run, asked)
    # DeepSpeed's command takes a launcher that was killed for one that ended well. The ranks notice, and leave, some
    # before this line.
    if code == 0:
        gone, outlived = psutil.wait_procs(ranks, timeout=0)
        _see_out(outlived)
        # Of a launcher that lived to their end there are no codes to be had.
        if outlived or any(rank.returncode is not None for rank in gone) or EXIT_PREEMPTED in _orphans_codes():
            code = EXIT_PREEMPTED
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)
    return code if code >= 0 else 128 - code


def _in_launcher() -> None:
    # The launchers inherit that SIGUSR1, which would end them, is ignored; the ranks take it when they are ready.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # Should this command be killed outright, so is the launcher: its ranks then write their checkpoint and leave.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait(run: subprocess.Popen[Any], asked: threading.Event) -> tuple[int, list[psutil.Process]]:
    """Its exit code, and the ranks that it had."""
    ranks: list[psutil.Process] = []
    while True:
        ranks = _ranks(run.pid) or ranks
        # A rank that is still starting ignores the signal: it is told again.
        if asked.is_set():
            _ask_to_stop(ranks)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return run.wait(timeout=1), ranks


def _orphans_codes() -> set[int]:
    """What those ended with whose parent has gone."""
    codes: set[int] = set()
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            codes.add(os.waitstatus_to_exitcode(ended[1]))
    return codes


def _see_out(ranks: list[psutil.Process]) -> None:
    """Wait until these have left, for as long as a checkpoint may take; those still starting have to be told."""
    for _ in range(SECONDS_AFTER_LAUNCHER + 30):
        _ask_to_stop(ranks)
        ranks = psutil.wait_procs(ranks, timeout=1)[1]
        if not ranks:
            return


def _ask_to_stop(ranks: list[psutil.Process]) -> None:
    for rank in ranks:
        with contextlib.suppress(psutil.Error):
            rank.send_signal(signal.SIGUSR1)


def _ranks(runner: int) -> list[psutil.Process]:
    """Without what they have started: a compiler among it would die of the signal."""
    with contextlib.suppress(psutil.Error):
        return [rank for launcher in psutil.Process(runner).children() for rank in launcher.children()]
    return []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
