"""A run that is asked to go: what asks it, and how all ranks come to know.

1. SIGTERM and SIGUSR1 to any rank only set a flag; so does the death of the launcher, which a thread waits for.
2. At each step's end, and after each batch of an evaluation, the ranks agree: one that was asked is enough. All write
   one checkpoint together and leave with ``EXIT_PREEMPTED``, which says: start the same command again, with
   training.resume=auto.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from pathlib import Path

# EX_TEMPFAIL of sysexits.h: not done, try again. No other exit of these programs has it.
EXIT_PREEMPTED = 75
# A rank that outlives its launcher has nobody to end it, should it hang.
SECONDS_AFTER_LAUNCHER = 120


_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether this process was asked to stop. One stands for the whole process: it takes over the two signals."""

    def __init__(self) -> None:
        self.reason: str | None = None
        for number in _SIGNALS:
            signal.signal(number, lambda number, _: self._ask(signal.Signals(number).name))
        if "LOCAL_RANK" in os.environ:
            self._watch_launcher()

    def is_made(self) -> bool:
        """True from then on; other ranks may not know yet."""
        return self.reason is not None

    @staticmethod
    def ignore_more() -> None:
        """On the way out: a signal that is repeated would change the exit code."""
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _ask(self, reason: str) -> None:
        self.reason = self.reason or reason

    def _watch_launcher(self) -> None:
        """A signal to the launcher, or to the ``deepspeed`` command above it, can end them and leave the ranks."""
        launchers = [os.getppid()]
        above = _parent_of(launchers[0])
        # Only DeepSpeed starts its launcher in a process of its own; what stands above others is a user's shell.
        if above > 1 and "deepspeed" in _command_of(above):
            launchers.append(above)
        try:
            handles = [os.pidfd_open(launcher) for launcher in launchers]
        except (AttributeError, OSError):
            return  # not Linux, or already gone: the signals still work
        threading.Thread(target=self._wait_for_end, args=(handles,), daemon=True).start()

    def _wait_for_end(self, handles: list[int]) -> None:
        ends = select.poll()
        for handle in handles:
            ends.register(handle, select.POLLIN)
        ends.poll()
        self._ask("the launcher's end")
        threading.Event().wait(SECONDS_AFTER_LAUNCHER)
        os._exit(EXIT_PREEMPTED)


def _parent_of(process: int) -> int:
    try:
        # The name, in brackets, may hold anything.
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def _command_of(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
