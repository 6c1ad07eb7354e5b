"""Samples that cannot be used: what can be wrong with one, and the count of them over a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

from audiotext_dist.distributed import World, gather_items, sums_over_ranks
from audiotext_dist.errors import UserError

_log = logging.getLogger(__name__)

BadKind = Literal[
    "missing_member",  # the row has no such member
    "cut_short",  # the shard ends before the member does
    "wrong_checksum",  # other bytes than were written
    "broken_audio",
    "broken_frame",
    "broken_json",
    "too_large",  # a picture, a sound or a member that would fill the memory
    "sample_rate",
    "no_caption",
    "not_embedded",  # a row that its feature file lacks
    "other",
]
KINDS: tuple[BadKind, ...] = get_args(BadKind)
# So many are borne before the share counts: one bad clip among the first fifty is no two per cent of the set.
NUM_BORNE = 10


class BadSampleError(Exception):
    """A sample that cannot be used; the message is its reason, ``kind`` the class that is counted."""

    def __init__(self, message: str, kind: BadKind = "other") -> None:
        super().__init__(message)
        self.kind = kind


class BadSample(NamedTuple):
    """A sample that was passed over, for the log."""

    shard: str
    key: str
    kind: BadKind
    reason: str


class BadSampleCount:
    """What the ranks of a run passed over: counted by kind, each named once, too many of them an error.

    Args:
        max_share: of the samples read so far; 0 bears none at all.
    """

    def __init__(self, max_share: float, world: World) -> None:
        self._max_share, self._world = max_share, world
        self._num_used = 0
        self._unseen: list[BadSample] = []  # since the last check
        self._totals = [0] * (1 + len(KINDS))  # samples used, then bad ones by kind, over all ranks
        self._named: set[tuple[str, str]] = set()

    def add(self, num_used: int, bad_samples: Sequence[BadSample]) -> None:
        """Count one batch of this rank."""
        self._num_used += num_used
        self._unseen += bad_samples

    def check(self) -> dict[str, int]:
        """Every rank calls it: logs the samples that are bad for the first time, and counts all.

        Returns:
            ``bad_samples``, over all ranks since the run began, and ``bad_samples/KIND`` for each kind met.

        Raises:
            UserError: more than ``max_share`` of the samples, on every rank alike.
        """
        found = [self._num_used, *(sum(bad.kind == kind for bad in self._unseen) for kind in KINDS)]
        new = sums_over_ranks(found, self._world.device)
        self._totals = [total + more for total, more in zip(self._totals, new, strict=True)]
        if any(new[1:]):
            self._name([bad for share in gather_items(self._unseen) for bad in share])
        self._num_used, self._unseen = 0, []
        num_used, *by_kind = self._totals
        num_bad = sum(by_kind)
        if num_bad > max(self._max_share * (num_used + num_bad), NUM_BORNE if self._max_share else 0):
            raise UserError(
                f"{num_bad} of {num_used + num_bad} samples could not be used, more than data.max_bad_share="
                f"{self._max_share} ({_told(by_kind)}): the warnings above name them; rebuild those shards"
            )
        met = {f"bad_samples/{kind}": count for kind, count in zip(KINDS, by_kind, strict=True) if count}
        return {"bad_samples": num_bad, **met}

    def _name(self, bad_samples: Sequence[BadSample]) -> None:
        for bad in bad_samples:
            if (bad.shard, bad.key) not in self._named:
                self._named.add((bad.shard, bad.key))
                if self._world.is_main:
                    _log.warning("replaced %s of %s: %s", bad.key, bad.shard, bad.reason)


def _told(by_kind: Sequence[int]) -> str:
    """``3 broken_audio, 1 too_large``, the most frequent first."""
    ranked = sorted(zip(by_kind, KINDS, strict=True), key=lambda pair: -pair[0])
    return ", ".join(f"{count} {kind}" for count, kind in ranked if count)
