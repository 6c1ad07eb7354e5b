"""``mode=check``: is the set in a folder the whole set of this row list, and undamaged? Nothing is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow

from audiotext_dist import storage
from audiotext_dist.data.index import INDEX_SUFFIX, SHARD_SUFFIX, ShardIndex
from audiotext_dist.data.shard_list import LIST_NAME
from audiotext_dist.errors import UserError
from shards import writer
from shards.finished import SHARD_REPORT_SUFFIX, list_problem, shard_path
from shards.job import BuildConfig, own_shards, shard_rows
from shards.record import Record
from shards.report import REPORT_NAME, from_parquet, written

PROBLEMS_TOLD = 10


def check(config: BuildConfig, records: Sequence[Record]) -> pyarrow.Table | None:
    """Compare each shard of this job's part with its index, its report and the row list.

    Returns:
        as ``job.run``: the set's report, or None where only a part of the set was looked at.

    Raises:
        UserError: names what is missing or wrong.
    """
    shards = shard_rows(len(records), config.clips_per_shard)
    own = own_shards(config, len(shards))
    problems: list[str] = []
    reports: list[pyarrow.Table] = []
    for number in own:
        found = _check_shard(config.out, number, [(row, records[row].name) for row in shards[number]], reports)
        problems += [f"{writer.shard_name(number)}: {problem}" for problem in found]
    tars = {Path(path).name for path in storage.list_files(config.out, SHARD_SUFFIX)}
    strangers = tars - {writer.shard_name(number) for number in range(len(shards))}
    problems += [f"{name}: no shard of this row list" for name in sorted(strangers)]
    is_whole = len(own) == len(shards)
    report = pyarrow.concat_tables(reports) if is_whole and not problems else None
    if report is not None:
        problems += _check_report(config.out, report)
        problems += [f"{LIST_NAME}: {problem}" for problem in [list_problem(config.out)] if problem]
    if problems:
        told = "; ".join(problems[:PROBLEMS_TOLD])
        more = f"; and {len(problems) - PROBLEMS_TOLD} more" if len(problems) > PROBLEMS_TOLD else ""
        raise UserError(f"{storage.public_name(config.out)} is not complete and undamaged: {told}{more}")
    return report


def _check_shard(out: str, number: int, rows: list[tuple[int, str]], reports: list[pyarrow.Table]) -> Iterator[str]:
    """What is wrong with a shard; the report of its rows is appended to ``reports``."""
    path = shard_path(out, number, SHARD_REPORT_SUFFIX)
    if not storage.exists(path):
        yield "not built: run the job again"
        return
    found = from_parquet(storage.read_bytes(path))
    reports.append(found)
    if list(zip(found["row"].to_pylist(), found["name"].to_pylist(), strict=True)) != rows:
        yield "its report is of other rows"
    keys = written(found)["key"].to_pylist()
    tar, beside = shard_path(out, number, SHARD_SUFFIX), shard_path(out, number, INDEX_SUFFIX)
    if not keys:
        yield from (
            f"{Path(path).name} stands there, but no row was written" for path in (tar, beside) if storage.exists(path)
        )
        return
    if not storage.exists(beside):
        yield "not finished: run the job again"
        return
    index = ShardIndex.from_json(storage.read_bytes(beside), storage.public_name(beside))
    if index.keys != keys:
        yield "its index and its report name other clips"
    if not storage.exists(tar):
        yield "the tar is missing: remove its index and run the job again"
        return
    num_bytes, sha256 = storage.digest(tar)
    if num_bytes != index.shard_bytes:
        yield f"{num_bytes} bytes, not {index.shard_bytes}: remove its index and run the job again"
    elif sha256 != index.sha256:
        yield "its SHA-256 is not its index's: remove its index and run the job again"


def _check_report(out: str, report: pyarrow.Table) -> Iterator[str]:
    path = storage.join(out, REPORT_NAME)
    if not storage.exists(path):
        yield f"{REPORT_NAME}: missing: run the job again"
    elif not from_parquet(storage.read_bytes(path)).equals(report):
        yield f"{REPORT_NAME}: not the sum of the shards' reports: run the job again"
