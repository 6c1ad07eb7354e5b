"""Builds as tests look at them: row by row."""

from __future__ import annotations

from collections.abc import Sequence

from shards.build import build
from shards.job import BuildConfig
from shards.record import Record
from shards.report import RowReport, to_rows


def build_rows(config: BuildConfig, records: Sequence[Record]) -> list[RowReport] | None:
    """``build``, its report as rows."""
    report = build(config, records)
    return None if report is None else to_rows(report)
