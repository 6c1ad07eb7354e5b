"""Members of shards, local or held by the node's cache, each checked against its index."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

from audiotext_dist import storage
from audiotext_dist.data.bad_samples import BadSampleError
from audiotext_dist.data.cache import NodeCache
from audiotext_dist.data.index import ShardIndex
from audiotext_dist.data.read_counts import ReadCounts
from audiotext_dist.data.sample import MAX_MEMBER_BYTES, checksum
from audiotext_dist.data.shard import Shard
from audiotext_dist.errors import UserError

Verify = Literal["size", "sha256"]


class ShardReader:
    """Reads members of shards by ``pread``; opens lazily, so it may cross into worker processes.

    Args:
        cache: where remote shards are held.
        verify: what is checked of a shard when it is first opened: its size, or all of its bytes. Each member's own
            checksum is checked whenever it is read, and all of a remote shard's bytes when they arrive.
        max_open_files: least recently used shards are closed above this number.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        cache: NodeCache | None = None,
        *,
        verify: Verify = "size",
        max_open_files: int = 128,
    ) -> None:
        self._shards = shards
        self._cache = NodeCache() if cache is None else cache
        self._counts = ReadCounts()
        self._verify, self._verified = verify, set[int]()
        self._max_open_files = max_open_files
        self._opened: OrderedDict[int, tuple[int, ShardIndex]] = OrderedDict()

    def read(self, shard: int, row: int, member: str) -> bytes:
        """The bytes of one member.

        Raises:
            BadSampleError: the row has no such member, or not the bytes that the index was made of.
            UserError: the shard is not the one its index describes.
        """
        descriptor, index = self._open(shard)
        entry = index.entry(row, member)
        if entry is None:
            raise BadSampleError(f"it has no {member}", "missing_member")
        offset, num_bytes, expected = entry
        if num_bytes > MAX_MEMBER_BYTES:
            raise BadSampleError(f"{member} has {num_bytes} bytes, more than {MAX_MEMBER_BYTES}", "too_large")
        try:
            content = os.pread(descriptor, num_bytes, offset)
        except OSError as error:
            raise _unreadable(self._shards[shard], error) from None
        self._counts.bytes_read += len(content)
        if len(content) != num_bytes:
            raise BadSampleError(f"{member} is cut short", "cut_short")
        if checksum(member, content) != expected:
            raise BadSampleError(f"{member} has changed since its shard was indexed", "wrong_checksum")
        return content

    def sha256(self, shard: int) -> str:
        """What tells a shard from every other, wherever it lies."""
        return self._shards[shard].sha256

    def _open(self, number: int) -> tuple[int, ShardIndex]:
        if number in self._opened:
            self._opened.move_to_end(number)
            return self._opened[number]
        shard = self._shards[number]
        index = shard.index
        descriptor = self._descriptor(shard)
        found_bytes = os.fstat(descriptor).st_size
        if found_bytes != index.shard_bytes:
            os.close(descriptor)
            raise UserError(
                f"{storage.public_name(shard.path)} has {found_bytes} bytes where its index says {index.shard_bytes}: "
                "build or copy the shard again"
            )
        if self._verify == "sha256" and number not in self._verified:
            descriptor = self._checked(descriptor, shard)
            self._verified.add(number)
        self._opened[number] = descriptor, index
        if len(self._opened) > self._max_open_files:
            os.close(self._opened.popitem(last=False)[1][0])
        return descriptor, index

    def _descriptor(self, shard: Shard) -> int:
        try:
            return self._cache.open(shard.path, num_bytes=shard.num_bytes, sha256=shard.sha256, counts=self._counts)
        except OSError as error:
            raise _unreadable(shard, error) from None

    def _checked(self, descriptor: int, shard: Shard) -> int:
        """The shard's descriptor when all of its bytes are right; what was damaged in the cache is fetched again."""
        with open(descriptor, "rb", closefd=False) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found == shard.sha256:
            return descriptor
        os.close(descriptor)
        if storage.is_remote(shard.path):
            self._cache.forget(shard.path, shard.sha256)
            return self._descriptor(shard)
        raise UserError(
            f"{storage.public_name(shard.path)} has changed since its index was made (SHA-256): "
            "build or copy the shard again"
        )

    def take_counts(self) -> ReadCounts:
        """What reading cost since the last call."""
        taken, self._counts = self._counts, ReadCounts()
        return taken

    def close_removed(self) -> None:
        """Close remote shards that the cache has removed: for as long as they are open, they take up its disk."""
        for shard, (descriptor, _) in list(self._opened.items()):
            if storage.is_remote(self._shards[shard].path) and os.fstat(descriptor).st_nlink == 0:
                os.close(self._opened.pop(shard)[0])

    def close(self) -> None:
        """Close the shards' files; the next read opens them again."""
        while self._opened:
            os.close(self._opened.popitem()[1][0])

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, object]:
        # Descriptors belong to one process.
        return {**self.__dict__, "_opened": OrderedDict()}


def _unreadable(shard: Shard, error: OSError) -> UserError:
    """What a disk's refusal means to a person."""
    shown = storage.public_name(shard.path)
    return UserError(f"{shown} cannot be read ({error.strerror}): mend the cause, or copy the shard again")
