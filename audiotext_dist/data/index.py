"""The index beside each shard: where every member lies, so that a sample is one ``pread`` a member.

``00000.tar`` has ``00000.index.json``, written last: a shard without one is not finished. A tar made
elsewhere is indexed by one scan of its headers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from audiotext_dist.errors import UserError

INDEX_VERSION = 2
SHARD_SUFFIX = ".tar"
INDEX_SUFFIX = ".index.json"


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """What a shard holds.

    members: member name -> int64 [num_samples, 3], (byte offset, bytes, ``checksum``) of each row's content;
    -1 three times where a row has no such member. num_captioned: clips with a caption, None where the index is older
    than that. sample_rate_hz: of every clip as its JSON says it, 0 where they differ or do not say.
    """

    shard_name: str
    shard_bytes: int
    sha256: str
    keys: list[str]
    recordings: list[str]
    members: dict[str, NDArray[np.int64]]
    num_captioned: int | None = None
    sample_rate_hz: int = 0

    @property
    def num_samples(self) -> int:
        """Rows of the shard."""
        return len(self.keys)

    def span(self, row: int, member: str) -> tuple[int, int] | None:
        """(byte offset, bytes) of a row's member, or None."""
        entry = self.entry(row, member)
        return None if entry is None else entry[:2]

    def entry(self, row: int, member: str) -> tuple[int, int, int] | None:
        """(byte offset, bytes, ``checksum``) of a row's member, or None."""
        if (entries := self.members.get(member)) is None:
            return None
        offset, num_bytes, found = entries[row].tolist()
        return None if offset < 0 else (offset, num_bytes, found)

    def to_json(self) -> bytes:
        """The index as it is stored."""
        return json.dumps(
            {
                "version": INDEX_VERSION,
                "shard": self.shard_name,
                "shard_bytes": self.shard_bytes,
                "sha256": self.sha256,
                "num_samples": self.num_samples,
                "num_captioned": self.num_captioned,
                "sample_rate_hz": self.sample_rate_hz,
                "keys": self.keys,
                "recordings": self.recordings,
                "members": {member: spans.tolist() for member, spans in self.members.items()},
            },
            ensure_ascii=False,
            separators=(",", ":"),
        ).encode()

    @classmethod
    def from_json(cls, content: bytes, name: str) -> ShardIndex:
        """Read a stored index.

        Raises:
            UserError: the content is no index of this version.
        """
        try:
            found = json.loads(content)
            if found["version"] != INDEX_VERSION:
                raise UserError(f"{name} has index version {found['version']}, not {INDEX_VERSION}: rebuild it")
            return cls(
                shard_name=found["shard"],
                shard_bytes=found["shard_bytes"],
                sha256=found["sha256"],
                keys=found["keys"],
                recordings=found["recordings"],
                members={
                    member: np.asarray(spans, np.int64).reshape(-1, 3) for member, spans in found["members"].items()
                },
                num_captioned=found.get("num_captioned"),
                sample_rate_hz=found.get("sample_rate_hz", 0),
            )
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{name} is not a shard index ({error!r}): remove it and build the shard again") from None


def index_path(shard_path: str) -> str:
    """``.../00000.tar`` -> ``.../00000.index.json``."""
    return shard_path.removesuffix(SHARD_SUFFIX) + INDEX_SUFFIX
