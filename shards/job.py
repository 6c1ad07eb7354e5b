"""The running of a build, so that any number of jobs may work on one set, be killed, and be run again.

1. Row i belongs to shard i // clips_per_shard. Job ``part=3/64`` builds the shards with number % 64 == 2.
2. A job claims a shard before it encodes its rows and leaves it to the other job where one has claimed it.
3. Each shard: the tar, the report of its rows, and last its index, which marks it as finished.
4. Whichever job finds every shard finished puts ``shards.parquet`` together, the list by which readers open the set,
   and ``report.parquet``, the account of every row.

On a disk a claim is a file lock, which ends with its job however that ends, and every file comes to its name by
a rename. An object store has no locks: there, jobs are kept apart by ``part``. Two of them on one shard put whole
objects of equal bytes, which does no harm; bytes that differ, because media arrived in between, are found by the
index's SHA-256. A job that is killed there may leave the parts of an upload that was not completed: no reader
sees them, and a bucket's lifecycle rule (AbortIncompleteMultipartUpload) removes them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import groupby
from typing import Any, Literal

import pyarrow
from tqdm import tqdm

from audiotext_dist import storage
from audiotext_dist.data.sample import Sample
from audiotext_dist.data.shard_list import remove_list, write_list
from audiotext_dist.errors import UserError
from shards import writer
from shards.executors import Executor, map_in_order
from shards.finished import (
    SHARD_REPORT_SUFFIX,
    finished_shards,
    is_finished,
    list_rows,
    read_reports,
    reopen,
    shard_path,
)
from shards.media import MediaConfig, Reason, try_clip
from shards.record import Record
from shards.report import REPORT_NAME, RowReport, row_report, shard_line, to_parquet, to_table


@dataclass(frozen=True, kw_only=True)
class BuildConfig(MediaConfig):
    """Where the shards go and how a build runs.

    out: a folder or URL; s3:// takes its endpoint and credentials from the environment (AWS_ENDPOINT_URL,
    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE, AWS_MAX_ATTEMPTS, or FSSPEC_S3_*), never from
    the URL. dataset: the name written into every clip's JSON.

    executor: ``local`` runs worker processes on this machine; ``ray`` runs them on the Ray cluster that
    RAY_ADDRESS names, whose machines must see the media under the same paths. num_workers: processes; 0 works in
    this one, where a decoder that crashes ends the build. row_timeout_seconds: a row that takes longer fails
    as ``timeout``. part: K/N, counted from 1, builds every N-th shard from the K-th on, one job of N.

    max_failed_share: of the rows, from 0 to 1. mode: ``resume`` keeps finished shards, ``overwrite`` removes
    the set and starts anew, ``check`` writes nothing and ends in an error unless the set is there, complete
    and undamaged. retry_failed: build finished shards with failed rows again, once their media have arrived.
    progress: ``bar``, or ``json``: one line a finished shard on stdout (shard, clips and failed rows, bytes of
    its members, seconds of sound).
    """

    out: str
    dataset: str
    clips_per_shard: int = 256
    executor: Executor = "local"
    num_workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    row_timeout_seconds: float = 120.0
    part: str = "1/1"
    max_failed_share: float = 0.1
    mode: Literal["resume", "overwrite", "check"] = "resume"
    retry_failed: bool = False
    progress: Literal["bar", "json"] = "bar"

    def __post_init__(self) -> None:
        super().__post_init__()
        if storage.public_name(self.out) != self.out:
            raise UserError(
                f"out={storage.public_name(self.out)} was given with a password or query: give credentials by "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
            )
        if self.clips_per_shard < 1 or self.num_workers < 0:
            raise UserError("clips_per_shard must be 1 or more and num_workers 0 or more")
        if self.executor == "ray" and self.num_workers == 0:
            raise UserError("executor=ray needs num_workers of 1 or more")
        if self.row_timeout_seconds <= 0:
            raise UserError(f"row_timeout_seconds={self.row_timeout_seconds:g} must be above 0")
        if not 0 <= self.max_failed_share <= 1:
            raise UserError(f"max_failed_share={self.max_failed_share:g}: give a share of the rows, 0 to 1")
        if _part_of(self.part)[1] > 1 and self.mode == "overwrite":
            raise UserError(f"mode=overwrite with part={self.part} would remove the other parts' shards: leave one out")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A record and its place in the list."""

    number: int
    record: Record


Outcome = tuple[Row, Sample | Reason]


def run(config: BuildConfig, records: Sequence[Record]) -> pyarrow.Table | None:
    """Build what is not built yet of this job's part.

    Returns:
        what ``out/report.parquet`` holds, one row a row of the list, in its order; None while other
        jobs' shards are not finished.

    Raises:
        UserError: ``out`` cannot be written.
    """
    shards = shard_rows(len(records), config.clips_per_shard)
    own = own_shards(config, len(shards))
    if config.retry_failed:
        reopen(config.out, own)
    finished = finished_shards(config.out)
    missing = {number: shards[number] for number in own if number not in finished}
    if missing:
        remove_list(config.out)
    _build_shards(config, records, missing)
    if len(finished_shards(config.out) & set(range(len(shards)))) < len(shards):
        return None
    report = pyarrow.concat_tables(read_reports(config.out, range(len(shards))))
    with storage.claimed(storage.join(config.out, "report"), wait=True):
        write_list(config.out, list_rows(config.out))
        storage.write_bytes(storage.join(config.out, REPORT_NAME), to_parquet(report))
    return report


def shard_rows(num_rows: int, clips_per_shard: int) -> list[range]:
    """Which rows each shard is made of."""
    return [range(first, min(first + clips_per_shard, num_rows)) for first in range(0, num_rows, clips_per_shard)]


def own_shards(config: BuildConfig, num_shards: int) -> range:
    """The numbers of the shards that are this job's part."""
    index, num_parts = _part_of(config.part)
    return range(index, num_shards, num_parts)


def _part_of(part: str) -> tuple[int, int]:
    """``3/64`` -> (2, 64)."""
    found = re.fullmatch(r"(\d+)/(\d+)", part)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"part={part}: give K/N with K from 1 to N, such as part=3/64")
    return int(found[1]) - 1, int(found[2])


def _build_shards(config: BuildConfig, records: Sequence[Record], missing: dict[int, range]) -> None:
    """Encode the rows of the missing shards in one stream and write each shard as its rows come."""
    media = MediaConfig(**{entry.name: getattr(config, entry.name) for entry in fields(MediaConfig)})
    encode = partial(_encode, media=media, dataset=config.dataset)
    is_bar_hidden = True if config.progress == "json" else None  # None: hidden where stderr is no terminal
    with (
        tqdm(total=sum(map(len, missing.values())), unit=" clips", disable=is_bar_hidden) as bar,
        contextlib.ExitStack() as claims,
    ):
        claim_of: dict[int, contextlib.ExitStack] = {}

        def claimed_rows() -> Iterator[Row]:
            for number, rows in missing.items():
                claim = claims.enter_context(contextlib.ExitStack())
                is_ours = claim.enter_context(storage.claimed(shard_path(config.out, number, "")))
                if not is_ours or is_finished(config.out, number):
                    claim.close()
                    bar.total -= len(rows)
                    continue
                claim_of[number] = claim
                yield from (Row(number=row, record=records[row]) for row in rows)

        outcomes = map_in_order(encode, claimed_rows(), config.num_workers, config.row_timeout_seconds, config.executor)
        with contextlib.closing(outcomes):
            for number, of_shard in groupby(
                _shown(outcomes, bar), lambda pair: pair[0].number // config.clips_per_shard
            ):
                reports = _write_shard(config.out, number, of_shard)
                claim_of.pop(number).close()
                if config.progress == "json":
                    print(json.dumps(shard_line(writer.shard_name(number), reports)), flush=True)


def _encode(row: Row, media: MediaConfig, dataset: str) -> Sample | Reason:
    """What a worker does with a row; an error that nobody foresaw costs this row and is shown on stderr."""
    try:
        return try_clip(row.record, media, dataset)
    except Exception:  # of any library that reads media
        sys.stderr.write(f"row {row.number}, {row.record.name}: {traceback.format_exc()}")
        return "crashed"


def _shown(outcomes: Iterator[Outcome], bar: Any) -> Iterator[Outcome]:
    """The outcomes, each counted on the progress bar."""
    num_failed = 0
    for row, outcome in outcomes:
        num_failed += not isinstance(outcome, Sample)
        bar.set_postfix(failed=num_failed, refresh=False)
        bar.update()
        yield row, outcome


def _write_shard(out: str, number: int, outcomes: Iterator[Outcome]) -> list[RowReport]:
    """Write one shard: the tar, the rows' report, the index."""
    name = writer.shard_name(number)
    reports: list[RowReport] = []

    def samples() -> Iterator[Sample]:
        for row, outcome in outcomes:
            reports.append(row_report(row.number, row.record.name, outcome, name))
            if isinstance(outcome, Sample):
                yield outcome

    index = writer.write_tar(out, name, samples())
    storage.write_bytes(shard_path(out, number, SHARD_REPORT_SUFFIX), to_parquet(to_table(reports)))
    if index is not None:
        writer.commit(out, index)
    return reports
