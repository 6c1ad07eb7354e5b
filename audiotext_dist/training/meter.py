"""What the data and memory cost, over all ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from audiotext_dist.data.batch import Batch
from audiotext_dist.data.read_counts import ReadCounts
from audiotext_dist.distributed import World, max_over_ranks, sums_over_ranks


class Meter:
    """What the data cost since it was last read: clips a second, share of time that ranks wait, bytes, cache.

    Beside it the memory of the rank that holds most: see ``_memory_bytes``.
    """

    def __init__(self, world: World, global_batch_size: int) -> None:
        self._world, self._global_batch_size = world, global_batch_size
        self._start = time.perf_counter()
        self._waited_seconds = 0.0
        self._num_batches = 0
        self._counts = ReadCounts()
        self._peak_bytes: dict[str, float] = {}
        _forget_peaks(world.device)

    def waiting_for(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, each wait measured."""
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self._waited_seconds += time.perf_counter() - before
            self._num_batches += 1
            self._counts += batch.counts
            yield batch

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """What happens inside counts as no time, and its memory is no step's."""
        before = time.perf_counter()
        self._note_peaks()
        yield
        self._start += time.perf_counter() - before
        _forget_peaks(self._world.device)

    def read(self) -> dict[str, float]:
        """Name -> figure over all ranks; starts anew. Bytes are those of the workers, which are some batches ahead."""
        now = time.perf_counter()
        seconds = now - self._start
        waiting_share, memory = self._waited_seconds / seconds, self._memory_bytes()
        less, most, *most_bytes = max_over_ranks([-waiting_share, waiting_share, *memory.values()], self._world.device)
        sums = sums_over_ranks(dataclasses.astuple(self._counts), self._world.device)
        counts = ReadCounts(*sums)
        figures = {
            "data/clips_per_second": self._num_batches * self._global_batch_size / seconds,
            "data/waiting_share_min": -less,
            "data/waiting_share_max": most,
            "data/read_bytes_per_second": counts.bytes_read / seconds,
            "data/fetched_bytes_per_second": counts.bytes_fetched / seconds,
            "data/cache_hits": counts.cache_hits,
            "data/cache_misses": counts.cache_misses,
            "data/prefetch_waits": counts.prefetch_waits,
            **{f"memory/{name}": num_bytes for name, num_bytes in zip(memory, most_bytes, strict=True)},
        }
        self._start, self._waited_seconds, self._num_batches, self._counts = now, 0.0, 0, ReadCounts()
        return figures

    def _memory_bytes(self) -> dict[str, float]:
        """This process's resident memory now; on an accelerator also the peaks of what was in use and what was held, of
        any step since the last reading.
        """
        self._note_peaks()
        resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
        found = {"resident_bytes": float(resident_pages * resource.getpagesize()), **self._peak_bytes}
        self._peak_bytes = {}
        _forget_peaks(self._world.device)
        return found

    def _note_peaks(self) -> None:
        device = self._world.device
        if device.type == "cuda":
            for name, num_bytes in (
                ("device_allocated_peak_bytes", torch.cuda.max_memory_allocated(device)),
                ("device_reserved_peak_bytes", torch.cuda.max_memory_reserved(device)),
            ):
                self._peak_bytes[name] = max(self._peak_bytes.get(name, 0.0), float(num_bytes))


def _forget_peaks(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
