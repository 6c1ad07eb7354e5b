"""What reading cost, as it is counted where it happens and logged each step."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass
class ReadCounts:
    """What reading cost since it was last asked.

    bytes_read: of members, from any disk. bytes_fetched: from remote storage. cache_hits: remote shards that
    were opened at once. cache_misses: shards that were fetched, ahead or not. prefetch_waits: reads that had to
    wait for a fetch, their own or another's.
    """

    bytes_read: int = 0
    bytes_fetched: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    prefetch_waits: int = 0

    def __iadd__(self, other: ReadCounts) -> ReadCounts:
        for entry in fields(self):
            setattr(self, entry.name, getattr(self, entry.name) + getattr(other, entry.name))
        return self
