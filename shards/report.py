"""The account of a build: every input row, as written or as failed with its reason."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow
import pyarrow.parquet
from pyarrow import compute

from audiotext_dist.data.sample import Sample, safe_key
from audiotext_dist.errors import UserError
from shards.reasons import MENDS, Reason

REPORT_NAME = "report.parquet"

_SCHEMA = pyarrow.schema(
    {
        "row": pyarrow.int64(),
        "name": pyarrow.string(),
        "key": pyarrow.string(),
        "status": pyarrow.string(),
        "shard": pyarrow.string(),
        "reason": pyarrow.string(),
        "seconds": pyarrow.float64(),
        "bytes": pyarrow.int64(),
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowReport:
    """What became of one input row.

    shard: the tar that holds it; None where it failed. reason: None where it was written. seconds, bytes:
    of the clip and of its members; 0 where it failed.
    """

    row: int
    name: str
    key: str
    status: Literal["written", "failed"]
    shard: str | None = None
    reason: Reason | None = None
    seconds: float = 0.0
    bytes: int = 0


def row_report(row: int, name: str, outcome: Sample | Reason, shard: str) -> RowReport:
    """Report a row by its sample, or by the reason why there is none."""
    if not isinstance(outcome, Sample):
        return RowReport(row=row, name=name, key=safe_key(name), status="failed", reason=outcome)
    return RowReport(
        row=row,
        name=name,
        key=outcome.key,
        status="written",
        shard=shard,
        seconds=outcome.metadata.duration,
        bytes=sum(map(len, outcome.members().values())),
    )


def to_table(rows: Sequence[RowReport]) -> pyarrow.Table:
    """The rows as a table, a column a field: of millions of rows, a fraction of the memory."""
    return pyarrow.table({name: [getattr(row, name) for row in rows] for name in _SCHEMA.names}, schema=_SCHEMA)


def to_parquet(table: pyarrow.Table) -> bytes:
    """The table as a Parquet file."""
    content = io.BytesIO()
    pyarrow.parquet.write_table(table, content)
    return content.getvalue()


def from_parquet(content: bytes) -> pyarrow.Table:
    """Read back what ``to_parquet`` wrote."""
    return pyarrow.parquet.read_table(io.BytesIO(content))


def to_rows(table: pyarrow.Table) -> list[RowReport]:
    """Read back what ``to_table`` made."""
    return [RowReport(**row) for row in table.to_pylist()]


def written(table: pyarrow.Table) -> pyarrow.Table:
    """Those rows of a report that are in a shard."""
    return table.filter(compute.equal(table["status"], "written"))


def summary(table: pyarrow.Table) -> str:
    """Some lines for a person: clips, hours, shards, bytes, and the failures by reason."""
    there = written(table)
    lines = [
        f"{there.num_rows} of {table.num_rows} clips written in {len(there['shard'].unique())} shards: "
        f"{(compute.sum(there['seconds']).as_py() or 0) / 3600:.2f} hours, "
        f"{(compute.sum(there['bytes']).as_py() or 0) / 1e9:.3f} GB"
    ]
    failures = count_failures(table)
    num_excluded = failures.pop("excluded", 0)
    lines += [f"{count} failed: {reason}" for reason, count in failures.most_common()]
    if num_excluded:
        lines.append(f"{num_excluded} excluded")
    return "\n".join(lines)


def shard_line(shard: str, rows: Sequence[RowReport]) -> dict[str, str | int | float]:
    """One finished shard for machines: seconds of sound and bytes of members among its written rows."""
    return {
        "shard": shard,
        "clips": sum(row.status == "written" for row in rows),
        "failed": sum(row.status == "failed" for row in rows),
        "bytes": sum(row.bytes for row in rows),
        "seconds": round(sum(row.seconds for row in rows), 3),
    }


def check_failed_share(table: pyarrow.Table, max_failed_share: float) -> None:
    """Refuse a set of which too much is absent; what was excluded is not.

    Raises:
        UserError: every row is excluded, or more than this share of the others failed.
    """
    failures = count_failures(table)
    num_wanted = table.num_rows - failures.pop("excluded", 0)
    if num_wanted == 0:
        raise UserError(f"all of {table.num_rows} clips are excluded: check exclude=")
    share = failures.total() / num_wanted
    if share > max_failed_share:
        reason, count = failures.most_common(1)[0]
        raise UserError(
            f"{share:.1%} of {num_wanted} clips failed (max_failed_share={max_failed_share:g}), {count} of them as "
            f"'{reason}': {MENDS[reason]} and build again with retry_failed=true, "
            "or raise max_failed_share to accept the set"
        )


def count_failures(table: pyarrow.Table) -> Counter[Reason]:
    """How often each reason is given."""
    return count_values(table, "reason")


def count_values(table: pyarrow.Table, column: str) -> Counter[Any]:
    """How often each value stands in a column, nulls apart, in the order in which they first come."""
    found = table[column].drop_null().value_counts()
    return Counter({each["values"]: each["counts"] for each in found.to_pylist()})
