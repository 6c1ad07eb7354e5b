"""Clotho: Freesound clips with five captions each.

1. The metadata, where it is given, says which Freesound upload each clip is from, and its keywords.
2. The caption list is read: ``file_name,caption_1,...,caption_5``.
3. Each clip is looked up in the media folder: by its name, or, where unpacking has changed it, by the name
   without character references (``&amp;``), edge spaces and ways of writing accents.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

from audiotext_dist.data.sample import freesound_recording
from audiotext_dist.errors import UserError
from shards.record import Record
from shards.sources.files import csv_rows, scan_by_stem, stem_of

CAPTION_COLUMNS = tuple(f"caption_{number}" for number in range(1, 6))

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class ClothoConfig:
    """One split of Clotho.

    captions: clotho_captions_{split}.csv. split: which one; some file names are in two, so it becomes part of
    a clip's name. media: the folder of the split's files, searched with all below it. metadata:
    clotho_metadata_{split}.csv, for the Freesound ids that tell the same recording in other datasets, and
    the keywords, which become labels.
    """

    captions: str
    split: Literal["development", "validation", "evaluation"]
    media: str
    metadata: str | None = None
    dataset: str = "clotho"


def records(config: ClothoConfig) -> Iterator[Record]:
    """Every clip of the list, in its order; ``media`` is None where no file was found.

    Raises:
        UserError: a list or folder is not there or cannot be read, or the metadata is of other clips.
    """
    found = _Names(scan_by_stem(config.media))
    metadata = _Names({} if config.metadata is None else _metadata(config.metadata))
    rows = [row for _, row in csv_rows(config.captions, ("file_name", *CAPTION_COLUMNS))]
    if config.metadata and not any(metadata.get(row["file_name"]) for row in rows):
        raise UserError(f"{config.metadata} names no clip of {config.captions}: give the metadata of the same split")
    for row in rows:
        name = row["file_name"]
        about = metadata.get(name) or {}
        sound_id = about.get("sound_id", "").strip()
        yield Record(
            name=f"{config.split}/{name}",
            media=found.get(stem_of(name)),
            recording=freesound_recording(sound_id) if sound_id.isdecimal() else f"clotho:{config.split}:{name}",
            captions=[caption for column in CAPTION_COLUMNS if (caption := row[column].strip())],
            labels=[word for keyword in about.get("keywords", "").split(";") if (word := keyword.strip())],
        )


class _Names(Generic[Value]):
    """Looks a name up as it is, else by its plain spelling where only one name has that."""

    def __init__(self, by_name: dict[str, Value]) -> None:
        self._by_name = by_name
        self._by_plain: dict[str, list[Value]] = {}
        for name, value in by_name.items():
            self._by_plain.setdefault(_plain(name), []).append(value)

    def get(self, name: str) -> Value | None:
        if name in self._by_name:
            return self._by_name[name]
        alike = self._by_plain.get(_plain(name), [])
        return alike[0] if len(alike) == 1 else None


def _plain(name: str) -> str:
    """Without suffix, character references, edge spaces, and with one way of writing accents."""
    return unicodedata.normalize("NFC", html.unescape(stem_of(name.strip()))).strip()


def _metadata(path: str) -> dict[str, dict[str, str]]:
    """File name -> its row. The published files are in Latin-1; ones saved again are most often in UTF-8."""
    try:
        Path(path).read_text("utf-8-sig")
        encoding = "utf-8-sig"
    except UnicodeDecodeError:
        encoding = "latin-1"
    except OSError:
        raise UserError(f"no list at {path}: check metadata=") from None
    return {row["file_name"]: row for _, row in csv_rows(path, ("file_name", "sound_id"), encoding)}
