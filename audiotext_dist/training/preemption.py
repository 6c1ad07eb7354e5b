"""A run that is asked to go: what asks it, and how all ranks come to know.

1. Until a run listens there is nothing to save: a signal, or the death of the launcher, which a thread waits for, ends
   the process.
2. From then on SIGTERM and SIGUSR1 to any rank only set a flag; so does the death of the launcher.
3. At each step's end, and after each batch of an evaluation, the ranks agree: one that was asked is enough. All write
   one checkpoint together and leave with ``EXIT_PREEMPTED``, which says: start the same command again, with
   training.resume=auto.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

# EX_TEMPFAIL of sysexits.h: not done, try again. No other exit of these programs has it.
EXIT_PREEMPTED = 75
# A rank that outlives its launcher has nobody to end it, should it hang.
SECONDS_AFTER_LAUNCHER = 120
# Where ``launch.run`` tells the ranks what ``this_process`` says of it, since they may start when it has died already.
WRAPPER_VARIABLE = "AUDIOTEXT_DIST_WRAPPER_PID"

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether this process was asked to stop. One stands for the whole process, from its first moments on."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._listens = False
        _watch_launcher(self._launcher_ended)

    def listen(self) -> None:
        """From now on a request waits for the next step, and no longer ends the process. Takes over the two signals."""
        for number in _SIGNALS:
            signal.signal(number, lambda number, _: self._ask(signal.Signals(number).name))
        self._listens = True

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

    def _launcher_ended(self) -> None:
        if not self._listens:
            _leave()
        self._ask("the launcher's end")
        threading.Event().wait(SECONDS_AFTER_LAUNCHER)
        os._exit(EXIT_PREEMPTED)


def this_process() -> str:
    """HOST:NUMBER."""
    return f"{socket.gethostname()}:{os.getpid()}"


def end_with_launcher() -> None:
    """For a program that has nothing to save: once its launcher is gone, nobody waits for it, nor could end it."""
    _watch_launcher(_leave)


def _leave() -> None:
    sys.stderr.write("error: this rank ends, since its launcher has; there was nothing to save\n")
    os._exit(EXIT_PREEMPTED)


def _watch_launcher(then: Callable[[], None]) -> None:
    """A signal to the launcher, or to the commands above it, can end them and leave the ranks."""
    if "LOCAL_RANK" not in os.environ:
        return
    launchers = [os.getppid()]
    above = _parent_of(launchers[0])
    # Only DeepSpeed starts its launcher in a process of its own; what stands above others is a user's shell.
    if above > 1 and "deepspeed" in _command_of(above):
        launchers.append(above)
    host, _, wrapper = os.environ.get(WRAPPER_VARIABLE, "").rpartition(":")
    # A starter of several nodes may hand the variable on to others.
    if host == socket.gethostname():
        launchers.append(int(wrapper))
    handles = []
    for launcher in launchers:
        try:
            handles.append(os.pidfd_open(launcher))
        except ProcessLookupError:
            then()
            return
        except (AttributeError, OSError):
            pass  # not Linux, or not allowed: the signals still work
    if handles:
        threading.Thread(target=_wait_for_end, args=(handles, then), daemon=True).start()


def _wait_for_end(handles: list[int], then: Callable[[], None]) -> None:
    ends = select.poll()
    for handle in handles:
        ends.register(handle, select.POLLIN)
    ends.poll()
    then()


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
