"""Builds that are killed at random moments, for tests: ``python killed_builds.py SEED KILLS out=WHOLE WORDS...``

1. Each build is a fork of this process, so that it is at work, not importing, when it is killed.
2. A first build of the same words, but out=WHOLE, is left alone: it shows how long the beginning and a shard take.
3. The first kill comes once a shard is finished, and is sure to meet a build: with a shard a row and 90 rows, the
   page that its stdout may hold unread is full before it ends.
4. The other kills come at moments drawn evenly from the time of the beginning, or of a shard after the first one
   that the build has finished: so the kills go over the whole set.
5. The last build is left to end. Prints how many kills met a build.
"""

from __future__ import annotations

import fcntl
import os
import random
import select
import signal
import sys
import time
from dataclasses import dataclass
from typing import IO

import webdataset.writer  # noqa: F401, what a build would import late

from shards import build

PAGE_BYTES = 4096  # the least that a pipe holds


@dataclass
class Build:
    """A build in a process of its own, and what it says on stdout: a line a finished shard."""

    pid: int
    said: IO[bytes]

    def end(self) -> bool:
        """Wait for its end; True if it was killed."""
        _, status = os.waitpid(self.pid, 0)
        self.said.close()
        assert os.WIFSIGNALED(status) or status == 0, f"a build ended with status {status}"
        return os.WIFSIGNALED(status)


def start(words: list[str], unread_bytes: int = 1 << 16) -> Build:
    """Begin a build with these words; it waits where more than so many bytes of its stdout are unread."""
    ours, theirs = os.pipe()
    fcntl.fcntl(ours, fcntl.F_SETPIPE_SZ, unread_bytes)
    pid = os.fork()
    if pid == 0:
        os.dup2(theirs, 1)
        sys.argv = ["build.py", *words, "progress=json"]
        build.main()
        sys.stdout.flush()
        os._exit(0)
    os.close(theirs)
    return Build(pid, os.fdopen(ours, "rb", buffering=0))


def left_alone(words: list[str]) -> tuple[float, float]:
    """Seconds until the first shard is finished, and for each of the others."""
    began = time.monotonic()
    whole = start(words)
    moments = [time.monotonic() for _ in whole.said]
    assert not whole.end()
    return moments[0] - began, (moments[-1] - moments[0]) / (len(moments) - 1)


def kill_after(victim: Build, seconds: float) -> bool:
    """Kill the build, unless it ends before; True if it was killed."""
    handle = os.pidfd_open(victim.pid)
    if not select.select([handle], [], [], seconds)[0]:
        os.kill(victim.pid, signal.SIGKILL)
    os.close(handle)
    return victim.end()


def main() -> None:
    """Kill builds, then let one end."""
    seed, num_kills, whole, *words = sys.argv[1:]
    first_seconds, shard_seconds = left_alone([whole if word.startswith("out=") else word for word in words])
    moments = random.Random(int(seed))
    first_victim = start(words, unread_bytes=PAGE_BYTES)
    first_victim.said.readline()
    num_killed = int(kill_after(first_victim, 0))
    for _ in range(int(num_kills) - 1):
        victim = start(words)
        if moments.random() < 0.5:
            victim.said.readline()
            num_killed += kill_after(victim, moments.uniform(0, shard_seconds))
        else:
            num_killed += kill_after(victim, moments.uniform(0, first_seconds))
    last = start(words)
    for _ in last.said:
        pass
    assert not last.end()
    print(num_killed)


if __name__ == "__main__":
    main()
