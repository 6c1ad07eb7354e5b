"""A shard's place and size, and the opening of those that a user names."""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import pyarrow

from audiotext_dist import storage
from audiotext_dist.data.cache import NodeCache
from audiotext_dist.data.index import SHARD_SUFFIX, ShardIndex, index_path
from audiotext_dist.data.scan import scan_tar
from audiotext_dist.data.shard_list import LIST_NAME, read_list
from audiotext_dist.errors import UserError
from audiotext_dist.retry import RetryConfig

# A build leaves its options in this file: in such a folder a tar without an index is not finished.
BUILD_SETTINGS = "build.json"
NUM_INDEX_READERS = 16
# In one process, of listed sets: twice what one rank reads at once by default; 40 MB for shards of 250 clips.
MAX_OPEN_INDEXES = 512
# To list a bucket takes a request a thousand files: of longer lists it is not compared.
MAX_COMPARED = 2000
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A shard's place, and what is known of it before its index is opened.

    num_bytes, sha256: of the tar. members: names of the members that its clips have, by spaces. num_captioned,
    sample_rate_hz: see ``ShardIndex``. index_sha256: of the index file, where a list tells it.
    """

    path: str
    num_samples: int
    num_bytes: int
    sha256: str
    members: str
    num_captioned: int | None
    sample_rate_hz: int
    index_sha256: str = ""
    retry: RetryConfig | None = None
    opened: ShardIndex | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, path: str, index: ShardIndex) -> Shard:
        """A shard whose index is open, and stays so."""
        return cls(
            path=path,
            num_samples=index.num_samples,
            num_bytes=index.shard_bytes,
            sha256=index.sha256,
            members=sys.intern(" ".join(index.members)),
            num_captioned=index.num_captioned,
            sample_rate_hz=index.sample_rate_hz,
            opened=index,
        )

    @property
    def index(self) -> ShardIndex:
        """Its index; that of a listed shard is opened now, unless it is one of the last that were.

        Raises:
            UserError: it is not the one that the list tells of.
        """
        return _listed_index(self) if self.opened is None else self.opened


@lru_cache(maxsize=MAX_OPEN_INDEXES)
def _listed_index(shard: Shard) -> ShardIndex:
    beside = index_path(shard.path)
    shown = storage.public_name(beside)
    try:
        content = storage.read_bytes(beside, shard.retry)
    except FileNotFoundError:
        raise UserError(
            f"{shown} is not there, and {LIST_NAME} beside it lists it: "
            "copy the whole set again, or run its build again"
        ) from None
    if hashlib.sha256(content).hexdigest() != shard.index_sha256:
        raise UserError(
            f"{shown} is not the index that {LIST_NAME} beside it lists: "
            "copy the whole set again, or run its build again"
        )
    index = ShardIndex.from_json(content, shown)
    _check_belongs(shard.path, index)
    return index


def load_shards(spec: str, cache: NodeCache | None = None) -> list[Shard]:
    """The shards a user's spec names (folder, glob, braces), in a fixed order.

    Where a list stands beside them nothing else is opened; where none does, every index is.

    Raises:
        UserError: nothing there, an unfinished shard of one of our builds, or an index of other content.
    """
    cache = NodeCache() if cache is None else cache
    shards: list[Shard] = []
    for part in spec.split("::"):
        is_folder = not part.endswith(SHARD_SUFFIX) and "*" not in part
        folder, _, pattern = (part.rstrip("/"), "", "*") if is_folder else part.rpartition("/")
        listed = None if set(folder) & set("{*") else read_list(folder or ".", cache.retry)
        if listed is None:
            shards += _indexed_shards(part, cache)
        else:
            shards += _listed_shards(folder, pattern, listed, cache.retry)
    return shards


def _listed_shards(folder: str, pattern: str, listed: pyarrow.Table, retry: RetryConfig) -> list[Shard]:
    """Those of a folder's listed shards that a pattern names; what the list does not tell of is refused."""
    names = listed["name"].to_pylist()
    anew = f"list it anew with python -m shards.index shards={storage.public_name(folder)}"
    present = names if storage.is_remote(folder) else _tars_in(folder or ".", retry)
    if "*" in pattern:
        chosen, asked = fnmatch.filter(names, pattern), fnmatch.filter(present, pattern)
    else:
        chosen = asked = storage.expand_braces(pattern)
    if strangers := set(asked) - set(names):
        raise UserError(f"{storage.public_name(folder)} has no {min(strangers)} in its {LIST_NAME}: {anew}")
    if absent := set(chosen) - set(present):
        raise UserError(f"{storage.public_name(folder)} has no {min(absent)}, and {LIST_NAME} lists it: {anew}")
    if not chosen:
        raise UserError(f"no {pattern} in the {LIST_NAME} of {storage.public_name(folder)}: check the path")
    if storage.is_remote(folder) and "*" in pattern:
        _warn_of_unlisted(folder, pattern, names, retry)
    shard_of = {
        name: Shard(
            path=f"{folder}/{name}" if folder else name,
            num_samples=num_samples,
            num_bytes=num_bytes,
            sha256=sha256,
            index_sha256=index_sha256,
            members=sys.intern(members),
            num_captioned=num_captioned,
            sample_rate_hz=sample_rate_hz,
            retry=retry,
        )
        for name, num_samples, num_bytes, sha256, index_sha256, members, num_captioned, sample_rate_hz in zip(
            *(column.to_pylist() for column in listed.columns), strict=True
        )
    }
    return [shard_of[name] for name in chosen]


def _warn_of_unlisted(folder: str, pattern: str, names: list[str], retry: RetryConfig) -> None:
    """On the main rank, say so where a bucket's folder holds tars that its list lacks, which are not read."""
    is_main = os.environ.get("RANK", "0") == "0"
    if not is_main or len(names) > MAX_COMPARED or folder.startswith(("http://", "https://")):
        return
    with contextlib.suppress(UserError):  # not everybody who may read may list
        if unlisted := set(fnmatch.filter(_tars_in(folder, retry), pattern)) - set(names):
            _log.warning(
                "%s has %s, which its %s lacks, so it is not read (%d such shards): "
                "list them with python -m shards.index shards=%s",
                storage.public_name(folder),
                min(unlisted),
                LIST_NAME,
                len(unlisted),
                storage.public_name(folder),
            )


def _tars_in(folder: str, retry: RetryConfig) -> list[str]:
    return [path.rpartition("/")[2] for path in storage.list_files(folder, SHARD_SUFFIX, retry)]


def _indexed_shards(spec: str, cache: NodeCache) -> list[Shard]:
    """Shards each with its index: that beside it, or one that a scan finds."""
    is_ours = lru_cache(lambda folder: storage.exists(storage.join(folder, BUILD_SETTINGS), cache.retry))

    def load(path: str) -> Shard:
        folder, _, name = path.rpartition("/")
        beside = index_path(path)
        if storage.exists(beside, cache.retry):
            index = ShardIndex.from_json(storage.read_bytes(beside, cache.retry), storage.public_name(beside))
            _check_belongs(path, index)
        elif is_ours(folder or "."):
            raise UserError(f"{storage.public_name(path)} is not finished: run its build again to the end")
        else:
            index = _scanned_index(path, name, cache)
        return Shard.of(path, index)

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
            index = scan_tar(Path(f"/proc/self/fd/{descriptor}"), name)
        finally:
            os.close(descriptor)
        cache.know(path, index.sha256)
        return index.to_json()

    identity = json.dumps(storage.identity(path, cache.retry), sort_keys=True)
    return ShardIndex.from_json(cache.note(path, identity, scan), storage.public_name(path))


def _check_belongs(path: str, index: ShardIndex) -> None:
    shown = storage.public_name(path)
    if index.shard_name != path.rpartition("/")[2]:
        raise UserError(f"the index beside {shown} is that of {index.shard_name}: copy or build the shard again")
    if storage.is_remote(path):
        return
    try:
        found_bytes = Path(path.removeprefix("file://")).stat().st_size
    except FileNotFoundError:
        raise UserError(f"{shown} is not there, only its index: copy the shard again") from None
    if found_bytes != index.shard_bytes:
        raise UserError(
            f"{shown} has {found_bytes} bytes where its index says {index.shard_bytes}: build or copy the shard again"
        )
