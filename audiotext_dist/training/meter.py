"""What the data cost, over all ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator

from audiotext_dist.data.batch import Batch
from audiotext_dist.data.read_counts import ReadCounts
from audiotext_dist.distributed import World, min_and_max_over_ranks, sums_over_ranks


class Meter:
    """What the data cost since it was last read: clips a second, share of time that ranks wait, bytes, cache."""

    def __init__(self, world: World, global_batch_size: int) -> None:
        self._world, self._global_batch_size = world, global_batch_size
        self._start = time.perf_counter()
        self._waited_seconds = 0.0
        self._num_batches = 0
        self._counts = ReadCounts()

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
        """What happens inside counts as no time."""
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before

    def read(self) -> dict[str, float]:
        """Name -> figure over all ranks; starts anew. Bytes are those of the workers, which are some batches ahead."""
        now = time.perf_counter()
        seconds = now - self._start
        least, greatest = min_and_max_over_ranks(self._waited_seconds / seconds, self._world.device)
        sums = sums_over_ranks(dataclasses.astuple(self._counts), self._world.device)
        counts = ReadCounts(*sums)
        figures = {
            "clips_per_second": self._num_batches * self._global_batch_size / seconds,
            "waiting_share_min": least,
            "waiting_share_max": greatest,
            "read_bytes_per_second": counts.bytes_read / seconds,
            "fetched_bytes_per_second": counts.bytes_fetched / seconds,
            "cache_hits": counts.cache_hits,
            "cache_misses": counts.cache_misses,
            "prefetch_waits": counts.prefetch_waits,
        }
        self._start, self._waited_seconds, self._num_batches, self._counts = now, 0.0, 0, ReadCounts()
        return figures
