"""The list of a set's shards: what a run must know of each before it reads it, so that no index is opened for it.

``shards.parquet`` stands in the set's folder, a row a shard. It is written when every shard is finished, and removed
before one is built anew: an index that is not the one listed is refused where it is opened. A set without a list has
all its indexes opened instead.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from typing import Any

import pyarrow
import pyarrow.parquet

from audiotext_dist import storage
from audiotext_dist.data.index import ShardIndex
from audiotext_dist.errors import UserError
from audiotext_dist.retry import RetryConfig

LIST_NAME = "shards.parquet"
_LIST_VERSION = "1"
_SCHEMA = pyarrow.schema(
    {
        "name": pyarrow.string(),
        "num_samples": pyarrow.int64(),
        "num_bytes": pyarrow.int64(),
        "sha256": pyarrow.string(),
        "index_sha256": pyarrow.string(),
        "members": pyarrow.string(),
        "num_captioned": pyarrow.int64(),
        "sample_rate_hz": pyarrow.int64(),
    },
    metadata={"audiotext_dist.shard_list": _LIST_VERSION},
)


def list_row(index: ShardIndex, stored: bytes) -> dict[str, Any]:
    """The row of a shard whose index is stored as these bytes.

    name, num_bytes, sha256: of the tar. index_sha256: of the index file. members: names that its clips' members have,
    by spaces. num_captioned, sample_rate_hz: see ``ShardIndex``.
    """
    return {
        "name": index.shard_name,
        "num_samples": index.num_samples,
        "num_bytes": index.shard_bytes,
        "sha256": index.sha256,
        "index_sha256": hashlib.sha256(stored).hexdigest(),
        "members": " ".join(index.members),
        "num_captioned": index.num_captioned,
        "sample_rate_hz": index.sample_rate_hz,
    }


def to_table(rows: Sequence[dict[str, Any]]) -> pyarrow.Table:
    """Rows as a list, in the order of their names."""
    return pyarrow.Table.from_pylist(sorted(rows, key=lambda row: str(row["name"])), schema=_SCHEMA)


def write_list(folder: str, rows: Sequence[dict[str, Any]]) -> None:
    """Put the list of a folder's shards in its place."""
    content = io.BytesIO()
    pyarrow.parquet.write_table(to_table(rows), content)
    storage.write_bytes(storage.join(folder, LIST_NAME), content.getvalue())


def remove_list(folder: str) -> None:
    """Take the list away, before anything that it tells of is changed."""
    storage.remove(storage.join(folder, LIST_NAME), missing_ok=True)


def read_list(folder: str, retry: RetryConfig | None = None) -> pyarrow.Table | None:
    """The list of a folder, a row a shard as ``list_row`` makes it, by name; None where there is none.

    Raises:
        UserError: it is no list of this version.
    """
    path = storage.join(folder, LIST_NAME)
    if not storage.exists(path, retry):
        return None
    try:
        content = storage.read_bytes(path, retry)
    except FileNotFoundError:  # removed just now, by a build
        return None
    try:
        table = pyarrow.parquet.read_table(io.BytesIO(content))
        if not table.schema.equals(_SCHEMA, check_metadata=True):
            raise pyarrow.ArrowInvalid("other columns, or another version")
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{storage.public_name(path)} is no list of shards ({' '.join(str(error).split())[:100]}): "
            "remove it, or list the set anew with python -m shards.index"
        ) from None
    return table
