"""The plan: which sample stands where in which global batch. Pure arithmetic, no files.

1. Every shard enters the epoch's stream as often as its set's weight says; a fractional weight takes an
   exact number of its rows, spread evenly over the set's shards.
2. The shards are permuted; their rows, each shard's in an order of its own, form one stream.
3. The stream is cut evenly over ``num_lanes`` lanes; what is left over is dropped this epoch.
4. Each lane shuffles within windows of ``window_shards`` shards.
5. A global batch takes ``global_batch_size / num_lanes`` samples of each lane, lane by lane.

Ranks own whole lanes, so the global batches do not depend on the number of nodes, ranks or workers, and
the data state of a run is (seed, epoch, global batch). Every order comes from numpy's counter-based Philox
keyed by (seed, epoch, ...), so any batch is found without those before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from audiotext_dist.errors import UserError

# Distinct first words keep the plan's random streams apart.
_SHARD_ORDER, _ROW_ORDER, _WINDOW_ORDER, _FRACTION_OFFSET = range(4)


class Slot(NamedTuple):
    """One place in a global batch: a row of a shard (numbered over all sets together).

    copy: which of the row's appearances in the epoch it is, where a set has a weight above 1.
    """

    shard: int
    row: int
    copy: int = 0


def default_num_lanes(global_batch_size: int) -> int:
    """The most lanes up to 64 that a batch divides into: a property of the batch, never of the cluster."""
    return math.gcd(global_batch_size, 64)


def check_lanes(*, global_batch_size: int, num_lanes: int, world_size: int) -> None:
    """Raise ``UserError`` unless ranks own whole lanes and lanes divide the batch."""
    if global_batch_size % num_lanes:
        raise UserError(
            f"data.num_lanes={num_lanes} does not divide training.global_batch_size={global_batch_size}: "
            f"choose one of {_divisors(global_batch_size)}"
        )
    if num_lanes % world_size:
        fitting = [lanes for lanes in _divisors(global_batch_size) if lanes % world_size == 0]
        other_lanes = (
            f"set data.num_lanes to one of {fitting}"
            if fitting
            else f"set training.global_batch_size to a multiple of {world_size}"
        )
        # First what also mends a run that is to go on.
        raise UserError(
            f"{world_size} processes cannot share data.num_lanes={num_lanes} evenly: "
            f"start one of {_divisors(num_lanes)} processes, or, for a new run, {other_lanes}"
        )


class Plan:
    """The order of one epoch.

    Args:
        set_sizes: for each data set, the number of rows of each of its shards.
        set_weights: for each data set, how often an epoch holds each of its rows (1 = once).
        window_shards: shards per shuffling window; a lane reads about so many at a time.

    Raises:
        UserError: the sets hold fewer samples than one global batch.
    """

    def __init__(
        self,
        *,
        set_sizes: Sequence[Sequence[int]],
        set_weights: Sequence[float],
        seed: int,
        epoch: int,
        global_batch_size: int,
        num_lanes: int,
        window_shards: int,
    ) -> None:
        assert global_batch_size % num_lanes == 0, "check_lanes comes first"
        assert len(set_sizes) == len(set_weights)
        self._seed, self._epoch = seed, epoch
        self._num_lanes, self._window_shards = num_lanes, window_shards
        self._lane_batch = global_batch_size // num_lanes
        self._shard_sizes = np.concatenate([np.asarray(sizes, np.int64) for sizes in set_sizes])

        shards, copies, takes = self._stream_entries(set_sizes, set_weights)
        order = self._random(_SHARD_ORDER).permutation(len(shards))
        self._shards, self._copies, self._takes = shards[order], copies[order], takes[order]
        self._starts = np.concatenate([[0], np.cumsum(self._takes)])  # entry -> first stream position
        self.num_samples = int(self._starts[-1])
        self._lane_length = self.num_samples // num_lanes
        self.num_batches = self._lane_length // self._lane_batch
        if not self.num_batches:
            raise UserError(
                f"an epoch holds {self.num_samples} samples, fewer than one batch: "
                f"set training.global_batch_size to at most {max(self.num_samples, 1)}"
            )
        self._first_entries = self._entry_at(np.arange(num_lanes) * self._lane_length)
        # An epoch is walked window by window: each lane is in one of its windows at a time.
        self._window = lru_cache(maxsize=2 * num_lanes)(self._make_window)

    def batch(self, number: int, *, rank: int = 0, world_size: int = 1) -> list[Slot]:
        """The slots of this rank's part of a global batch, ``global_batch_size / world_size`` of them.

        Concatenated over the ranks in order they are the same list for every world size.
        """
        assert 0 <= number < self.num_batches
        assert self._num_lanes % world_size == 0, "check_lanes comes first"
        num_own = self._num_lanes // world_size
        lanes = np.arange(rank * num_own, (rank + 1) * num_own).repeat(self._lane_batch)
        steps = np.tile(np.arange(self._lane_batch), num_own) + number * self._lane_batch
        positions = lanes * self._lane_length + steps
        windows = (self._entry_at(positions) - self._first_entries[lanes]) // self._window_shards
        return [
            self._slot(lane, window, position)
            for lane, window, position in zip(lanes.tolist(), windows.tolist(), positions.tolist(), strict=True)
        ]

    def shards_ahead(self, number: int, *, rank: int, world_size: int) -> Iterator[int]:
        """The shards that this rank's lanes read from a global batch on, in the order in which they are needed.

        A window's shards are needed together, so these go first for every lane, then the next window's.
        """
        num_own = self._num_lanes // world_size
        lanes = np.arange(rank * num_own, (rank + 1) * num_own)
        here = self._entry_at(lanes * self._lane_length + number * self._lane_batch)
        window_starts = here - (here - self._first_entries[lanes]) % self._window_shards
        last_entries = self._entry_at((lanes + 1) * self._lane_length - 1)
        entries = list(zip(window_starts.tolist(), last_entries.tolist(), strict=True))
        while entries:
            for window, last in entries:
                yield from map(int, self._shards[window : min(window + self._window_shards, last + 1)])
            entries = [(w + self._window_shards, last) for w, last in entries if w + self._window_shards <= last]

    def _stream_entries(
        self, set_sizes: Sequence[Sequence[int]], set_weights: Sequence[float]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """(shard, copy number, rows taken) of every entry, in the order of the sets."""
        parts: list[NDArray[np.int64]] = []
        first_shard = 0
        for number, (sizes_given, weight) in enumerate(zip(set_sizes, set_weights, strict=True)):
            sizes = np.asarray(sizes_given, np.int64)
            shards = np.arange(first_shard, first_shard + len(sizes))
            whole, fraction = int(weight), weight - int(weight)
            parts += [np.stack([shards, np.full_like(shards, copy), sizes]) for copy in range(whole)]
            if fraction > 0:
                # Cumulative rounding from a random offset: exact in sum, even over the shards, and no
                # shard is favoured in every epoch.
                offset = self._random(_FRACTION_OFFSET, number).integers(len(sizes))
                rolled = np.roll(sizes, -offset)
                taken_until = np.rint(fraction * np.concatenate([[0], np.cumsum(rolled)])).astype(np.int64)
                takes = np.roll(np.diff(taken_until), offset)
                parts.append(np.stack([shards, np.full_like(shards, whole), takes]))
            first_shard += len(sizes)
        shards, copies, takes = np.concatenate(parts, axis=1)
        return shards, copies, takes

    def _slot(self, lane: int, window: int, position: int) -> Slot:
        start, slots = self._window(lane, window)
        return Slot._make(slots[position - start].tolist())

    def _entry_at(self, stream_positions: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self._starts, stream_positions, side="right") - 1

    def _make_window(self, lane: int, window: int) -> tuple[int, NDArray[np.int64]]:
        """A window's first stream position within its lane, and its slots in their order, int64 [slots, 3]."""
        first_entry = int(self._first_entries[lane]) + window * self._window_shards
        entries = range(first_entry, min(first_entry + self._window_shards, len(self._shards)))
        start = max(lane * self._lane_length, int(self._starts[entries[0]]))
        stop = min((lane + 1) * self._lane_length, int(self._starts[entries[-1] + 1]))
        slots = np.concatenate([self._slots_of(entry, start, stop) for entry in entries])
        return start, slots[self._random(_WINDOW_ORDER, lane, window).permutation(stop - start)]

    def _slots_of(self, entry: int, start: int, stop: int) -> NDArray[np.int64]:
        """The entry's slots between two stream positions, in the entry's own row order, int64 [slots, 3]."""
        shard, copy, first = int(self._shards[entry]), int(self._copies[entry]), int(self._starts[entry])
        order = self._random(_ROW_ORDER, shard, copy).permutation(self._shard_sizes[shard])
        rows = order[max(start - first, 0) : min(max(stop - first, 0), int(self._takes[entry]))]
        return np.stack([np.full_like(rows, shard), rows, np.full_like(rows, copy)], axis=1)

    def _random(self, *words: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self._seed, self._epoch, *words])))


def evaluation_slots(shard_sizes: Sequence[int], *, rank: int, world_size: int) -> list[Slot]:
    """Every row exactly once, in a fixed order, dealt to the ranks in turn; nothing is dropped."""
    every = [Slot(shard=shard, row=row) for shard, size in enumerate(shard_sizes) for row in range(size)]
    return every[rank::world_size]


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
