"""Any dataset with a list: csv, tsv, jsonl or parquet, whose columns the options name.

1. The list is read row by row.
2. Each row becomes a record; its recording is what a pattern finds in its name, or the clip itself.
3. A part of the list is taken by a hash of the recording, so that no recording is on both sides.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet

from audiotext_dist.errors import UserError
from shards.record import Record

DELIMITERS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """A list of clips, one a row.

    table: the list; its suffix tells its form. media: the folder that media_column is relative to (default:
    the list's own). name_column: unique names (default: media_column). caption_columns, label_column: each
    cell one text, or a list of texts (in csv as JSON). start_column, end_column: seconds of a cut inside
    the file. recording_pattern: a regular expression with one group, searched in the name; what it finds,
    after recording_prefix and a colon, is the recording ('\\d+-(\\d+)-' and freesound: "freesound:103298");
    without it every clip is its own. split: all rows, or the train or held_out side of a split by recording,
    of which held_out_share is held out, drawn by split_seed.
    """

    table: str
    dataset: str
    media: str | None = None
    media_column: str = "file"
    name_column: str | None = None
    caption_columns: list[str] = field(default_factory=lambda: ["caption"])
    label_column: str | None = None
    start_column: str | None = None
    end_column: str | None = None
    recording_pattern: str | None = None
    recording_prefix: str | None = None
    split: Literal["all", "train", "held_out"] = "all"
    held_out_share: float = 0.2
    split_seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.held_out_share <= 1:
            raise UserError(f"held_out_share={self.held_out_share:g}: give a share of the recordings, 0 to 1")
        if self.recording_pattern is None:
            if self.recording_prefix is not None:
                raise UserError("recording_prefix needs a recording_pattern: give both or none")
            return
        try:
            num_groups = re.compile(self.recording_pattern).groups
        except re.error as error:
            raise UserError(f"recording_pattern is no regular expression ({error}): mend it") from None
        if num_groups != 1:
            raise UserError(f"recording_pattern has {num_groups} groups: put one (...) around the recording's id")


def records(config: TableConfig) -> Iterator[Record]:
    """The rows of the list that belong to the part, in the list's order.

    Raises:
        UserError: the list cannot be read, lacks a column, or has a cell of the wrong kind.
    """
    path = Path(config.table)
    if not path.is_file():
        raise UserError(f"no list at {path}: check table=")
    media = Path(os.path.abspath(path.parent if config.media is None else config.media))  # noqa: PTH100, keeps links
    if not media.is_dir():
        raise UserError(f"no folder at {media}: check media=")
    for place, row in read_rows(path):
        record = _record(config, media, row, place)
        if config.split == "all" or (config.split == "held_out") == _is_held_out(config, record.recording):
            yield record


def _record(config: TableConfig, media: Path, row: dict[str, Any], place: str) -> Record:
    def cell(column: str) -> Any:
        if column not in row:
            raise UserError(f"{place} has no column '{column}', only {', '.join(row)}: name it by its option")
        return row[column]

    file = cell(config.media_column)
    name = str(file if config.name_column is None else cell(config.name_column))
    if not name or name == "None":
        raise UserError(f"{place} has no name: fill '{config.name_column or config.media_column}'")
    return Record(
        name=name,
        media=_inside(media, str(file), place) if file else None,
        recording=_recording(config, name, place),
        captions=[text for column in config.caption_columns for text in _texts(cell(column), column, place)],
        labels=[] if config.label_column is None else _texts(cell(config.label_column), config.label_column, place),
        start_seconds=None if config.start_column is None else _seconds(cell(config.start_column), place),
        end_seconds=None if config.end_column is None else _seconds(cell(config.end_column), place),
    )


def _inside(media: Path, file: str, place: str) -> str:
    """The path of a file of the media folder, which no name in a list may leave."""
    path = os.path.normpath(media / file)
    if os.path.commonpath([media, path]) != str(media):
        raise UserError(f"{place}: {file!r:.60} is not in {media}: mend the row, or give a folder above it as media=")
    return path


def _recording(config: TableConfig, name: str, place: str) -> str:
    prefix = config.recording_prefix or config.dataset
    if config.recording_pattern is None:
        return f"{prefix}:{name}"
    found = re.search(config.recording_pattern, name)
    if found is None or found.group(1) is None:
        raise UserError(f"{place}: recording_pattern finds nothing in '{name}': widen it")
    return f"{prefix}:{found.group(1)}"


def _is_held_out(config: TableConfig, recording: str) -> bool:
    digest = hashlib.sha256(f"{config.split_seed}:{recording}".encode()).digest()
    return int.from_bytes(digest[:8]) < config.held_out_share * 2**64


def _texts(cell: Any, column: str, place: str) -> list[str]:
    """A cell's texts: itself, or the items of a list, which a csv holds as JSON; empty ones are left out."""
    if isinstance(cell, str) and cell.startswith("["):
        with contextlib.suppress(json.JSONDecodeError):  # a text may begin with a bracket
            cell = json.loads(cell)
    items = cell if isinstance(cell, list) else [] if cell is None else [cell]
    if not all(isinstance(item, str) for item in items):
        raise UserError(f"{place}: '{column}' holds {items!r:.60}, which is neither a text nor a list of texts")
    return [item.strip() for item in items if item.strip()]


def _seconds(cell: Any, place: str) -> float | None:
    if cell is None or cell == "":
        return None
    try:
        return float(cell)
    except (TypeError, ValueError):
        raise UserError(f"{place}: '{cell}' is no number of seconds: mend the cell") from None


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row with its place in the list, for error messages."""
    try:
        match path.suffix:
            case ".csv" | ".tsv":
                yield from _csv_rows(path)
            case ".jsonl":
                yield from _jsonl_rows(path)
            case ".parquet":
                batches = pyarrow.parquet.ParquetFile(path).iter_batches()
                rows = (row for batch in batches for row in batch.to_pylist())
                yield from ((f"{path} row {number}", row) for number, row in enumerate(rows))
            case _:
                raise UserError(f"{path} is of no known form: give a .csv, .tsv, .jsonl or .parquet file")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8: convert it (iconv -f latin1 -t utf-8)") from None
    except (csv.Error, pyarrow.ArrowInvalid) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}): check its form") from None


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=DELIMITERS[path.suffix])
        for row in reader:
            place = f"{path} line {reader.line_num}"
            if None in row or None in row.values():
                raise UserError(f"{place} has more or fewer cells than the header: mend it")
            yield place, row


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path} line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{place} is not JSON ({error}): mend it") from None
            if not isinstance(row, dict):
                raise UserError(f"{place} is not a JSON object: mend it")
            yield place, row
