"""A rank that hangs, or whose link is cut, ends the run on all ranks.

A thread of each rank writes a count into the process group's store, which rank 0 holds, and reads the others' in one
request. It lives as long as its process runs, whatever the main thread waits for, so a rank is silent only where it is
stopped, dead or out of reach. A silent rank is named, and this process ends, from the thread: the main one may wait in
a collective that never returns. A rank that is alive but stuck is left to the collectives' own timeout, which is a
little longer, so that it does not end the run before a silent rank is named.
"""

from __future__ import annotations

import os
import sys
import threading
import time

import torch.distributed as dist

from audiotext_dist.distributed import World, barrier, is_parallel

# EX_UNAVAILABLE of sysexits.h: another rank is not there.
EXIT_LOST = 69


def beat_seconds(timeout_seconds: float) -> float:
    """Between two signs of life; a silent rank is noticed at most two of them after the limit."""
    return min(5.0, timeout_seconds / 10)


class Heartbeat:
    """Starts at once, when every rank has come to it; ``stop`` before leaving the process group."""

    def __init__(self, world: World, timeout_seconds: float) -> None:
        self._world, self._timeout_seconds = world, timeout_seconds
        self._stopped = threading.Event()
        if is_parallel():
            # A connection of its own: the main thread may hold the other one while it waits.
            self._store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
            self._store.set(_key(world.rank), "0")
            barrier()  # reading many counts at once waits for those that were never written
            threading.Thread(target=self._beat, daemon=True).start()

    def stop(self, *, together: bool) -> None:
        """No more watching; ``together`` waits for every rank, so that none misses one that has left already."""
        self._stopped.set()
        if together:
            barrier()

    def _beat(self) -> None:
        others = [rank for rank in range(self._world.size) if rank != self._world.rank]
        last, silent_seconds = dict.fromkeys(others, b""), dict.fromkeys(others, 0.0)
        count, before, pause_seconds = 0, time.monotonic(), beat_seconds(self._timeout_seconds)
        while not self._stopped.wait(pause_seconds):
            count += 1
            asking = threading.Timer(self._timeout_seconds, self._end, [[0], "does not answer"])
            asking.daemon = True
            asking.start()
            try:
                self._store.set(_key(self._world.rank), str(count))
                found = dict(zip(others, self._store.multi_get([_key(rank) for rank in others]), strict=True))
            except RuntimeError:
                # The store went with rank 0: this is how the others hear that it is gone.
                self._end([0], "is gone")
                return
            finally:
                asking.cancel()
            now = time.monotonic()
            # Where more has passed this process itself was stopped, as in a suspended job: no fault of the others.
            passed_seconds, before = min(now - before, 3 * pause_seconds), now
            for rank in others:
                is_heard = found[rank] != last[rank]
                silent_seconds[rank] = 0.0 if is_heard else silent_seconds[rank] + passed_seconds
            last = found
            silent = [rank for rank, seconds in silent_seconds.items() if seconds > self._timeout_seconds]
            if silent:
                self._end(silent, f"gave no sign of life for {self._timeout_seconds:g} s")

    def _end(self, ranks: list[int], what: str) -> None:
        if self._stopped.is_set():
            return
        named = " and ".join(f"rank {rank}" for rank in ranks)
        sys.stderr.write(
            f"error: {named} {what} (engine.collective_timeout_seconds={self._timeout_seconds:g}), rank "
            f"{self._world.rank} ends: look at that node; training.resume=auto goes on from the last checkpoint\n"
        )
        sys.stderr.flush()
        os._exit(EXIT_LOST)


def _key(rank: int) -> str:
    return f"heartbeat/{rank}"
