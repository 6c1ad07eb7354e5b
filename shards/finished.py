"""What stands in a set's folder: which shards are finished, and what became of their rows.

A shard is finished when its index is there, or when its report says that no row of it could be had.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow

from audiotext_dist import storage
from audiotext_dist.data.index import INDEX_SUFFIX, SHARD_SUFFIX, ShardIndex
from audiotext_dist.data.shard_list import LIST_NAME, list_row, read_list, to_table
from audiotext_dist.errors import UserError
from shards import writer
from shards.report import REPORT_NAME, count_failures, from_parquet

SHARD_REPORT_SUFFIX = ".report.parquet"
REPORTS_READ_AT_ONCE = 16


def shard_path(out: str, number: int, suffix: str) -> str:
    """Where a file of this shard stands."""
    return storage.join(out, writer.shard_name(number).removesuffix(SHARD_SUFFIX) + suffix)


def finished_shards(out: str) -> set[int]:
    """The numbers of the shards that need no more work."""
    indexed = _numbers(out, INDEX_SUFFIX)
    reported_only = sorted(_numbers(out, SHARD_REPORT_SUFFIX) - indexed)
    empty = {
        number for number, rows in zip(reported_only, read_reports(out, reported_only), strict=True) if _is_empty(rows)
    }
    return indexed | empty


def read_reports(out: str, numbers: Sequence[int]) -> Iterator[pyarrow.Table]:
    """The reports of these shards, in their order, several under way at once."""
    with ThreadPoolExecutor(REPORTS_READ_AT_ONCE) as threads:
        yield from map(
            from_parquet,
            threads.map(storage.read_bytes, (shard_path(out, number, SHARD_REPORT_SUFFIX) for number in numbers)),
        )


def list_rows(out: str) -> list[dict[str, Any]]:
    """The rows of the set's list: of every shard that has clips."""

    def row(path: str) -> dict[str, Any]:
        stored = storage.read_bytes(path)
        return list_row(ShardIndex.from_json(stored, storage.public_name(path)), stored)

    with ThreadPoolExecutor(REPORTS_READ_AT_ONCE) as threads:
        return list(threads.map(row, storage.list_files(out, INDEX_SUFFIX)))


def list_problem(out: str) -> str | None:
    """What is wrong with a folder's list of shards, if it has one."""
    try:
        found = read_list(out)
        is_stale = found is not None and not found.equals(to_table(list_rows(out)))
    except UserError as error:
        return str(error)
    return "not the list of these indexes: run the build again, or remove it" if is_stale else None


def is_finished(out: str, number: int) -> bool:
    """True if this shard needs no more work, as seen now."""
    if storage.exists(shard_path(out, number, INDEX_SUFFIX)):
        return True
    return storage.exists(shard_path(out, number, SHARD_REPORT_SUFFIX)) and _is_empty(next(read_reports(out, [number])))


def reopen(out: str, own: range) -> None:
    """Take back the commit marks of finished shards with failed rows: a resumed build makes them anew."""
    reported = sorted(_numbers(out, SHARD_REPORT_SUFFIX) & set(own))
    for number, rows in zip(reported, read_reports(out, reported), strict=True):
        if count_failures(rows).keys() - {"excluded"}:
            for path in (
                storage.join(out, LIST_NAME),
                storage.join(out, REPORT_NAME),
                shard_path(out, number, INDEX_SUFFIX),
                shard_path(out, number, SHARD_REPORT_SUFFIX),
            ):
                storage.remove(path, missing_ok=True)


def _numbers(out: str, suffix: str) -> set[int]:
    stems = (Path(path).name.removesuffix(suffix) for path in storage.list_files(out, suffix))
    return {int(stem) for stem in stems if stem.isdecimal()}


def _is_empty(rows: pyarrow.Table) -> bool:
    return bool(count_failures(rows).total() == rows.num_rows)
