"""Samples into one tar shard.

1. The tar is written under a temporary name: one sample after another, no clock, no user in its headers,
   so that equal samples give equal bytes.
2. It is indexed by the same scan that indexes tars made elsewhere, and put in its place.
3. ``commit`` writes the index: from then on the shard counts as finished.
"""

from __future__ import annotations

import io
import itertools
import tarfile
from collections.abc import Iterator

from audiotext_dist import storage
from audiotext_dist.data.index import SHARD_SUFFIX, ShardIndex, index_path
from audiotext_dist.data.sample import Sample
from audiotext_dist.data.scan import scan_tar

COPY_BYTES = 1 << 20


def shard_name(number: int) -> str:
    """``00000.tar``, ``00001.tar``, ..."""
    return f"{number:05d}{SHARD_SUFFIX}"


def write_tar(out: str, name: str, samples: Iterator[Sample]) -> ShardIndex | None:
    """Write the samples to ``out/name``; the shard is not finished before ``commit``.

    Returns:
        The shard's index, or None where there are no samples and nothing was written.
    """
    first = next(samples, None)
    if first is None:
        return None
    with storage.atomic_file(storage.join(out, name)) as temporary:
        # webdataset's TarWriter gives the same bytes, but copies what is left of a member every 10 KiB of it.
        with tarfile.TarFile(temporary, "w", format=tarfile.PAX_FORMAT, copybufsize=COPY_BYTES) as tar:
            for sample in itertools.chain([first], samples):
                for member, content in sorted(sample.members().items()):
                    entry = tarfile.TarInfo(f"{sample.key}.{member}")
                    entry.size, entry.mode = len(content), 0o444
                    tar.addfile(entry, io.BytesIO(content))
        return scan_tar(temporary, name)


def commit(out: str, index: ShardIndex) -> None:
    """Write the index beside its shard."""
    storage.write_bytes(index_path(storage.join(out, index.shard_name)), index.to_json())
