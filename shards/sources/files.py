"""Published lists and folders of media, as the sources read them."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path

from audiotext_dist.errors import UserError

# Where a clip has several files, the first of these is taken: picture before sound.
MEDIA_SUFFIXES = (
    *(".mp4", ".mkv", ".webm", ".mov", ".avi", ".flv", ".3gp", ".m4v"),
    *(".flac", ".wav", ".m4a", ".opus", ".ogg", ".aac", ".mp3"),
)
_RANK = {suffix: rank for rank, suffix in enumerate(MEDIA_SUFFIXES)}


def csv_lines(
    path: str, encoding: str = "utf-8-sig", *, spaces_after_commas: bool = False
) -> Iterator[tuple[str, list[str]]]:
    """Each line's place, for error messages, and its cells.

    spaces_after_commas: they are the list's, not the cells', and may stand before a quotation mark.

    Raises:
        UserError: the list is not there, or is no csv in this encoding.
    """
    try:
        with Path(path).open(encoding=encoding, newline="") as file:
            reader = csv.reader(file, skipinitialspace=spaces_after_commas)
            for cells in reader:
                yield f"{path} line {reader.line_num}", cells
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"no list at {path}: check the path") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error}): check that it is a csv file in UTF-8") from None


def csv_rows(path: str, columns: tuple[str, ...], encoding: str = "utf-8-sig") -> Iterator[tuple[str, dict[str, str]]]:
    """Each row's place and its cells by the header's names; empty lines are passed over.

    Raises:
        UserError: as ``csv_lines``, or a column is missing, or a row has more or fewer cells than the header.
    """
    lines = csv_lines(path, encoding)
    _, header = next(lines, ("", []))
    if absent := [column for column in columns if column not in header]:
        raise UserError(f"{path} has no column '{absent[0]}', only {', '.join(header)}: give the published list")
    for place, cells in lines:
        if len(cells) == len(header):
            yield place, dict(zip(header, cells, strict=True))
        elif cells:
            raise UserError(f"{place} has more or fewer cells than the header: mend it")


def scan(media: str) -> Iterator[tuple[str, str]]:
    """(stem, path) of every media file in and below the folder, always in the same order.

    Names are looked up in what a scan found, never opened: so no name in a list leads out of the folder.

    Raises:
        UserError: no such folder.
    """
    if not Path(media).is_dir():
        raise UserError(f"no folder at {media}: check media=")
    for folder, subfolders, names in os.walk(media):
        subfolders.sort()
        for name in sorted(names):
            stem, is_media = _split(name)
            if is_media:
                yield stem, f"{folder}/{name}"


def scan_by_stem(media: str) -> dict[str, str]:
    """Stem -> path, of files with one stem the preferred one. Raises as ``scan``."""
    found: dict[str, str] = {}
    for stem, path in scan(media):
        other = found.get(stem)
        if other is None or suffix_rank(path) < suffix_rank(other):
            found[stem] = path
    return found


def stem_of(name: str) -> str:
    """The name without its suffix, if that is one of media: ``a.b.wav`` -> ``a.b``, ``a.b`` -> ``a.b``."""
    return _split(name)[0]


def suffix_rank(path: str) -> int:
    """The place of a media file's suffix in ``MEDIA_SUFFIXES``."""
    return _RANK[path[path.rindex(".") :].lower()]


def _split(name: str) -> tuple[str, bool]:
    # Neither a Path nor splitext: there may be millions of files.
    stem, _, suffix = name.rpartition(".")
    return (stem, True) if stem.strip(".") and f".{suffix.lower()}" in _RANK else (name, False)
