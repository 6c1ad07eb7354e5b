"""The scan of a tar, which finds what its index says: of a shard that was just built, or of one made elsewhere."""

from __future__ import annotations

import contextlib
import tarfile
from pathlib import Path

import numpy as np

from audiotext_dist import storage
from audiotext_dist.data.index import ShardIndex
from audiotext_dist.data.sample import (
    MAX_MEMBER_BYTES,
    METADATA_MEMBER,
    ClipMetadata,
    checksum,
    is_member,
    split_member,
)
from audiotext_dist.errors import UserError


def scan_tar(path: Path, shard_name: str) -> ShardIndex:
    """Index a local tar by reading all of it once: where each member lies, its checksum, what each clip's JSON says.

    A clip whose JSON cannot be read is its own recording; the reader passes it over. So it does with members of more
    than ``MAX_MEMBER_BYTES``, which are not read here either.

    Members of other names than a sample's are passed over, as shards from elsewhere may hold them.

    Raises:
        UserError: the file is no tar, is cut short or damaged, or holds a member twice.
    """
    rows: dict[str, dict[str, tuple[int, int, int]]] = {}
    metadata: dict[str, ClipMetadata] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for entry in tar:
                key, member = split_member(entry.name)
                if not (entry.isfile() and is_member(member)):
                    continue
                if member in rows.setdefault(key, {}):
                    raise UserError(f"{shard_name} holds '{entry.name}' twice: give each clip a key of its own")
                if entry.size > MAX_MEMBER_BYTES:  # the reader refuses it
                    rows[key][member] = (entry.offset_data, entry.size, 0)
                    continue
                file = tar.extractfile(entry)
                assert file is not None
                content = file.read()
                rows[key][member] = (entry.offset_data, entry.size, checksum(member, content))
                if member == METADATA_MEMBER:
                    # A clip with broken JSON is passed over where it is read, and told then.
                    with contextlib.suppress(ValueError):
                        metadata[key] = ClipMetadata.from_json(content, key)
            end_of_members = tar.offset
    except UserError:
        raise
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{shard_name} cannot be read as a tar ({error}): build or copy it again") from None
    if not _ends_as_a_tar(path, end_of_members):
        raise UserError(f"{shard_name} is cut short or damaged at byte {end_of_members}: build or copy it again")
    names = sorted({member for members in rows.values() for member in members})
    absent = (-1, -1, -1)
    rates_hz = {found.sample_rate for found in metadata.values()}
    return ShardIndex(
        shard_name=shard_name,
        shard_bytes=path.stat().st_size,
        sha256=storage.sha256_of(path),
        keys=list(rows),
        recordings=[metadata[key].recording if key in metadata else key for key in rows],
        members={
            name: np.asarray([members.get(name, absent) for members in rows.values()], np.int64).reshape(-1, 3)
            for name in names
        },
        num_captioned=sum(bool(found.text) for found in metadata.values()),
        sample_rate_hz=rates_hz.pop() if len(rates_hz) == 1 else 0,
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
