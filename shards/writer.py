"""Samples into one tar shard.

1. The tar is written under a temporary name: one sample after another, no clock, no user in its headers,
   so that equal samples give equal bytes.
2. It is indexed by the same scan that indexes tars made elsewhere, and put in its place.
3. ``commit`` writes the index: from then on the shard counts as finished.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from audiotext_dist import storage
from audiotext_dist.data.index import SHARD_SUFFIX, ShardIndex, index_path, scan_tar
from audiotext_dist.data.sample import Sample


def shard_name(number: int) -> str:
    """``00000.tar``, ``00001.tar``, ..."""
    return f"{number:05d}{SHARD_SUFFIX}"


def write_tar(out: str, name: str, samples: Iterator[Sample]) -> ShardIndex | None:
    """Write the samples to ``out/name``; the shard is not finished before ``commit``.

    Returns:
        The shard's index, or None where there are no samples and nothing was written.
    """
    # webdataset imports torch, which would cost every worker process a second and its memory.
    from webdataset.writer import TarWriter

    first = next(samples, None)
    if first is None:
        return None
    with storage.atomic_file(storage.join(out, name)) as temporary:
        with (
            temporary.open("wb") as file,
            TarWriter(file, encoder=False, mtime=0, user="", group="", mode=0o444) as tar,
        ):
            for sample in itertools.chain([first], samples):
                tar.write({"__key__": sample.key, **sample.members()})
        return scan_tar(temporary, name)


def commit(out: str, index: ShardIndex) -> None:
    """Write the index beside its shard."""
    storage.write_bytes(index_path(storage.join(out, index.shard_name)), index.to_json())
