"""Build tar shards: ``python -m shards.build SOURCE key=value ...``

1. The source reads its lists and says which clips there are: one record a row.
2. ``build.json`` in the set's folder says with which options the set was begun; others are refused.
3. ``job`` packs the rows into shards, in worker processes, alone or as one job of many.
4. ``report.parquet`` accounts for every row, and a set with too many failures ends in an error.

A build that was stopped goes on where it was: finished shards are kept, the others are built again.
"""

from __future__ import annotations

import gc
import inspect
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow

from audiotext_dist import storage
from audiotext_dist.configuration import describe, parse, to_dict
from audiotext_dist.data.index import INDEX_SUFFIX, SHARD_SUFFIX
from audiotext_dist.data.sample import safe_key
from audiotext_dist.data.shard import BUILD_SETTINGS
from audiotext_dist.data.shard_list import LIST_NAME
from audiotext_dist.errors import UserError, run_for_people
from audiotext_dist.memory import keep_freed_memory
from shards.check import check
from shards.finished import SHARD_REPORT_SUFFIX
from shards.job import BuildConfig, run
from shards.record import Record
from shards.report import REPORT_NAME, check_failed_share, summary
from shards.sources import audiocaps, audioset, clotho, soundscape, table, wavcaps


@dataclass(frozen=True, kw_only=True)
class SoundscapeBuild(soundscape.SoundscapeConfig, BuildConfig):
    """A soundscape is rendered at the sample rate that the shards hold."""

    dataset: str = "soundscape"

    def __post_init__(self) -> None:
        BuildConfig.__post_init__(self)
        soundscape.SoundscapeConfig.__post_init__(self)


@dataclass(frozen=True, kw_only=True)
class TableBuild(table.TableConfig, BuildConfig):
    """A table is most often one of sounds alone."""

    require_frames: bool = False

    def __post_init__(self) -> None:
        BuildConfig.__post_init__(self)
        table.TableConfig.__post_init__(self)


@dataclass(frozen=True, kw_only=True)
class AudioSetBuild(audioset.AudioSetConfig, BuildConfig):
    """An AudioSet clip has sound and picture."""


@dataclass(frozen=True, kw_only=True)
class AudioCapsBuild(audiocaps.AudioCapsConfig, BuildConfig):
    """AudioCaps is used with and without pictures: a clip of sound alone is packed as well."""

    require_frames: bool = False


@dataclass(frozen=True, kw_only=True)
class ClothoBuild(clotho.ClothoConfig, BuildConfig):
    """Clotho's clips have no picture."""

    require_frames: bool = False


@dataclass(frozen=True, kw_only=True)
class WavCapsBuild(wavcaps.WavCapsConfig, BuildConfig):
    """WavCaps' clips have no picture."""

    require_frames: bool = False


# These do not change what the shards hold, so a stopped build may go on with others.
FREE_OPTIONS = {
    *("out", "executor", "num_workers", "row_timeout_seconds", "part"),
    *("max_failed_share", "mode", "retry_failed", "progress"),
}
LIST_OPTIONS = {"table", "segments", "class_labels", "captions", "metadata", "exclude"}

USAGE = """usage: python -m shards.build SOURCE key=value ...

SOURCE is one of
  soundscape   a procedural world of sounds and pictures: needs no data
  table        any dataset with a list: csv, tsv, jsonl or parquet
  audioset     AudioSet segment lists and the media that could be fetched
  audiocaps    AudioCaps lists: AudioSet clips with captions
  clotho       one split of Clotho
  wavcaps      one part of WavCaps, with exclusion lists

python -m shards.build SOURCE --help lists the keys. Example:
  python -m shards.build table table=clips.jsonl dataset=mine out=shards/mine
"""


Config = TypeVar("Config", bound=BuildConfig)


def main() -> None:
    """The command: choose the source."""
    source, *words = sys.argv[1:] or ["--help"]
    keep_freed_memory()
    match source:
        case "-h" | "--help":
            print(USAGE, end="")
        case "soundscape":
            _run(SoundscapeBuild, words, lambda config: soundscape.records(config, config.num_workers))
        case "table":
            _run(TableBuild, words, table.records)
        case "audioset":
            _run(AudioSetBuild, words, audioset.records)
        case "audiocaps":
            _run(AudioCapsBuild, words, audiocaps.records)
        case "clotho":
            _run(ClothoBuild, words, clotho.records)
        case "wavcaps":
            _run(WavCapsBuild, words, wavcaps.records)
        case _:
            raise UserError(f"no source '{source}': give soundscape, table, audioset, audiocaps, clotho or wavcaps")


def build(config: BuildConfig, records: Sequence[Record]) -> pyarrow.Table | None:
    """Build what is not built yet of the set, or of this job's part of it.

    Returns:
        what ``out/report.parquet`` holds, one row a row of the list, in its order; None while other
        jobs' shards are not finished.

    Raises:
        UserError: as ``check_records``, or an ``out`` that holds another set or cannot be written; with
            mode=check also a set that is not complete and undamaged.
    """
    check_records(records)
    if config.mode == "check":
        _check_claimed(config)
        return check(config, records)
    _claim_out(config)
    return run(config, records)


def _run(schema: type[Config], words: Sequence[str], read: Callable[[Config], Iterator[Record]]) -> None:
    if {"-h", "--help"} & set(words):
        print(_help(schema))
        return
    config = parse(schema, words)
    records = all_records(read(config))
    report = build(config, records)
    # The JSON lines have stdout for themselves.
    people = sys.stderr if config.progress == "json" else sys.stdout
    if report is None:
        print(f"part {config.part} is done, other parts of the set are not yet", file=people)
        return
    print(summary(report), file=people)
    for path, count in Counter(path for record in records for path in record.excluded_by).items():
        print(f"  {count} named by {path}", file=people)
    check_failed_share(report, config.max_failed_share)


def _help(schema: type[Config]) -> str:
    """What each configuration class says of its keys, then every key with its default."""
    texts = [inspect.cleandoc(level.__doc__ or "") for level in schema.__mro__ if level not in (schema, object)]
    return "\n\n".join([*texts, "Keys and defaults:\n\n" + describe(schema)])


def all_records(found: Iterator[Record]) -> list[Record]:
    """The whole row list."""
    # Of millions of rows none is garbage, and to look for it among them takes a third of the time.
    gc.set_threshold(100_000, 50, 1000)
    return list(found)


def check_records(records: Sequence[Record]) -> None:
    """Refuse a list that cannot become a set.

    Raises:
        UserError: no rows, two rows of one name, or a text that is no Unicode.
    """
    if not records:
        raise UserError("the source gives no rows: check its list and its options")
    keys: set[str] = set()
    for row, record in enumerate(records):
        try:
            "\n".join([record.name, *record.captions, *record.labels]).encode()
        except UnicodeEncodeError:
            raise UserError(f"row {row}, {record.name!r:.60}, is no valid Unicode text: mend its row") from None
        keys.add(safe_key(record.name))
        if len(keys) == row:
            first = [safe_key(other.name) for other in records].index(safe_key(record.name))
            raise UserError(f"rows {first} and {row} are both named '{record.name}': names must be unique")


def _claim_out(config: BuildConfig) -> None:
    """Make ``out`` this build's folder: new, or begun with the same options, or emptied to overwrite."""
    path = storage.join(config.out, BUILD_SETTINGS)
    with storage.claimed(storage.join(config.out, "build"), wait=True):
        if not storage.exists(path) and storage.list_files(config.out, SHARD_SUFFIX):
            raise UserError(f"{config.out} holds tars of something else: give another out=")
        if config.mode == "overwrite":
            _remove_set(config.out)
        settings = _settings(config)
        if storage.exists(path):
            _check_same(json.loads(storage.read_bytes(path)), settings, config.out)
        else:
            storage.write_bytes(path, json.dumps(settings, indent=2).encode())


def _check_claimed(config: BuildConfig) -> None:
    """Refuse to look at a folder that this build did not begin."""
    path = storage.join(config.out, BUILD_SETTINGS)
    if not storage.exists(path):
        raise UserError(f"no set was begun at {config.out}: build it first, or check out=")
    _check_same(json.loads(storage.read_bytes(path)), _settings(config), config.out)


def _settings(config: BuildConfig) -> dict[str, Any]:
    """The options that decide what the shards hold; of a list its content counts, not its place."""
    settings = {key: value for key, value in to_dict(config).items() if key not in FREE_OPTIONS}
    for key in LIST_OPTIONS & settings.keys():
        paths = settings[key]
        if isinstance(paths, list):
            settings[key] = [_content(path) for path in paths]
        elif paths is not None:
            settings[key] = _content(paths)
    return settings


def _content(path: str) -> str:
    return f"sha256:{storage.sha256_of(Path(path))}"


def _check_same(before: dict[str, Any], now: dict[str, Any], out: str) -> None:
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise UserError(
                f"{out} was begun with {key}={before.get(key)}, not {now.get(key)}: "
                "give the same again, another out=, or mode=overwrite to build the set anew"
            )


def _remove_set(out: str) -> None:
    """Remove what a build writes, the commit marks first and the options last."""
    for suffix in (LIST_NAME, INDEX_SUFFIX, SHARD_REPORT_SUFFIX, SHARD_SUFFIX, REPORT_NAME, BUILD_SETTINGS):
        for path in storage.list_files(out, suffix):
            storage.remove(path)


if __name__ == "__main__":
    run_for_people(main)
