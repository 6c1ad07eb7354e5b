"""The index beside each shard: where every member lies, so that a sample is one ``pread`` a member.

``00000.tar`` has ``00000.index.json``, written last: a shard without one is not finished. A tar made
elsewhere is indexed by one scan of its headers.
"""

from __future__ import annotations

import contextlib
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from audiotext_dist import storage
from audiotext_dist.data.cache import NodeCache
from audiotext_dist.data.sample import METADATA_MEMBER, ClipMetadata, checksum, is_member, split_member
from audiotext_dist.errors import UserError

INDEX_VERSION = 2
SHARD_SUFFIX = ".tar"
INDEX_SUFFIX = ".index.json"
# A build leaves its options in this file: in such a folder a tar without an index is not finished.
BUILD_SETTINGS = "build.json"
NUM_INDEX_READERS = 16


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """What a shard holds.

    members: member name -> int64 [num_samples, 3], (byte offset, bytes, ``checksum``) of each row's content;
    -1 three times where a row has no such member.
    """

    shard_name: str
    shard_bytes: int
    sha256: str
    keys: list[str]
    recordings: list[str]
    members: dict[str, NDArray[np.int64]]

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
            )
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{name} is not a shard index ({error!r}): remove it and build the shard again") from None


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A shard's place and its index."""

    path: str
    index: ShardIndex


def index_path(shard_path: str) -> str:
    """``.../00000.tar`` -> ``.../00000.index.json``."""
    return shard_path.removesuffix(SHARD_SUFFIX) + INDEX_SUFFIX


def scan_tar(path: Path, shard_name: str) -> ShardIndex:
    """Index a local tar by reading all of it once: where each member lies, its checksum, each clip's recording.

    A clip whose JSON cannot be read is its own recording; the reader passes it over.

    Members of other names than a sample's are passed over, as shards from elsewhere may hold them.

    Raises:
        UserError: the file is no tar, is cut short or damaged, or holds a member twice.
    """
    rows: dict[str, dict[str, tuple[int, int, int]]] = {}
    recordings: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for entry in tar:
                key, member = split_member(entry.name)
                if not (entry.isfile() and is_member(member)):
                    continue
                if member in rows.setdefault(key, {}):
                    raise UserError(f"{shard_name} holds '{entry.name}' twice: give each clip a key of its own")
                file = tar.extractfile(entry)
                assert file is not None
                content = file.read()
                rows[key][member] = (entry.offset_data, entry.size, checksum(member, content))
                if member == METADATA_MEMBER:
                    # A clip with broken JSON is passed over where it is read, and told then.
                    with contextlib.suppress(ValueError):
                        recordings[key] = ClipMetadata.from_json(content, key).recording
            end_of_members = tar.offset
    except UserError:
        raise
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{shard_name} cannot be read as a tar ({error}): build or copy it again") from None
    if not _ends_as_a_tar(path, end_of_members):
        raise UserError(f"{shard_name} is cut short or damaged at byte {end_of_members}: build or copy it again")
    names = sorted({member for members in rows.values() for member in members})
    absent = (-1, -1, -1)
    return ShardIndex(
        shard_name=shard_name,
        shard_bytes=path.stat().st_size,
        sha256=storage.sha256_of(path),
        keys=list(rows),
        recordings=[recordings.get(key, key) for key in rows],
        members={
            name: np.asarray([members.get(name, absent) for members in rows.values()], np.int64).reshape(-1, 3)
            for name in names
        },
    )


def _ends_as_a_tar(path: Path, end_of_members: int) -> bool:
    """True if whole blocks of zeros follow the last member, two at least.

    tarfile takes a header that is cut or damaged for the end and says nothing: only what follows tells.
    """
    num_zeros = 0
    with path.open("rb") as file:
        file.seek(end_of_members)
        while content := file.read(1 << 20):
            if content.strip(b"\0"):
                return False
            num_zeros += len(content)
    return num_zeros >= 2 * tarfile.BLOCKSIZE and num_zeros % tarfile.BLOCKSIZE == 0


def load_shards(spec: str, cache: NodeCache | None = None) -> list[Shard]:
    """The shards a user's spec names (folder, glob, braces), each with its index, in a fixed order.

    Raises:
        UserError: nothing there, an unfinished shard of one of our builds, or an index of other content.
    """
    cache = NodeCache() if cache is None else cache
    is_ours = lru_cache(lambda folder: storage.exists(storage.join(folder, BUILD_SETTINGS), cache.retry))

    def load(path: str) -> Shard:
        folder, _, name = path.rpartition("/")
        beside = index_path(path)
        if storage.exists(beside, cache.retry):
            index = ShardIndex.from_json(storage.read_bytes(beside, cache.retry), storage.public_name(beside))
            _check_belongs(path, name, index)
        elif is_ours(folder or "."):
            raise UserError(f"{storage.public_name(path)} is not finished: run its build again to the end")
        else:
            index = _scanned_index(path, name, cache)
        return Shard(path=path, index=index)

    paths = storage.expand(spec, SHARD_SUFFIX, cache.retry)
    # A remote index is two answers of a server: many are asked for at once.
    with ThreadPoolExecutor(NUM_INDEX_READERS if storage.is_remote(paths[0]) else 1) as readers:
        return list(readers.map(load, paths))


def _scanned_index(path: str, name: str, cache: NodeCache) -> ShardIndex:
    """The index of a tar from elsewhere: found by a scan, then kept in the cache while the tar stays the same.

    A remote tar is fetched for it whole: a scan needs a request a member and its checksum every byte, and
    training reads it from the cache soon after.
    """

    def scan() -> bytes:
        descriptor = cache.open(path)
        try:
            return scan_tar(Path(f"/proc/self/fd/{descriptor}"), name).to_json()
        finally:
            os.close(descriptor)

    identity = json.dumps(storage.identity(path, cache.retry), sort_keys=True)
    return ShardIndex.from_json(cache.note(path, INDEX_SUFFIX, identity, scan), storage.public_name(path))


def _check_belongs(path: str, name: str, index: ShardIndex) -> None:
    shown = storage.public_name(path)
    if index.shard_name != name:
        raise UserError(f"the index beside {shown} is that of {index.shard_name}: copy or build the shard again")
    if not storage.is_remote(path) and (found_bytes := Path(path).stat().st_size) != index.shard_bytes:
        raise UserError(
            f"{shown} has {found_bytes} bytes where its index says {index.shard_bytes}: build or copy the shard again"
        )
