"""Segments of YouTube videos: what AudioSet, AudioCaps and WavCaps' AudioSet part have in common.

1. The media folder is scanned once; files go by the names that the usual downloaders give: ``{ytid}.*``,
   ``{ytid}_{start}.*`` and ``{ytid}_{start}_{end}.*``, with a Y before or without, in seconds or milliseconds.
2. A segment's own file is taken whole; the file of a whole video is cut; the file of another segment is not taken.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence

from audiotext_dist.data.sample import youtube_recording
from shards.record import Record
from shards.sources import files

# A video's id has 11 characters, so it is clear where it ends though it may hold Y and _ itself.
_STEM = re.compile(r"Y?([A-Za-z0-9_-]{11})(?:_(\d+(?:\.\d+)?))?(?:_\d+(?:\.\d+)?)?")

# For millions of files the table must be small: hashes instead of ids, whose names tell which is right, and the
# few videos with several files have them in one text with this between.
_BETWEEN = "\0"


def seconds(cell: str) -> float:
    """A time in a list. Raises ValueError where it is none."""
    found = float(cell)
    if not 0 <= found < math.inf:
        raise ValueError(f"{cell} is no time in a video")
    return found


def scan(media: str) -> dict[int, str]:
    """Hash of a video's id -> the files, for ``find``; see ``files.scan`` for the errors."""
    found: dict[int, str] = {}
    for stem, path in files.scan(media):
        if match := _STEM.fullmatch(stem):
            key = _hash(match.group(1))
            found[key] = f"{found[key]}{_BETWEEN}{path}" if key in found else path
    return found


def find(found: dict[int, str], ytid: str, start_seconds: float | None = None) -> tuple[str | None, bool]:
    """The file for a segment, and whether its name says that it is that segment alone.

    Without a start, a file of any segment will do, but one of the whole video is preferred.
    """
    candidates = []
    paths = found.get(_hash(ytid))
    for path in paths.split(_BETWEEN) if paths else []:
        match = _STEM.fullmatch(files.stem_of(os.path.basename(path)))  # noqa: PTH119, as in files
        assert match is not None
        if match.group(1) != ytid:
            continue
        named_start = match.group(2)
        is_cut = named_start is not None
        if not is_cut or start_seconds is None or _is_time(named_start, start_seconds):
            candidates.append((is_cut == (start_seconds is None), files.suffix_rank(path), path, is_cut))
    if not candidates:
        return None, False
    *_, path, is_cut = min(candidates)
    return path, is_cut


def segment(
    found: dict[int, str],
    ytid: str,
    start_seconds: float,
    end_seconds: float,
    *,
    whole_videos: bool,
    captions: Sequence[str] = (),
    labels: Sequence[str] = (),
) -> Record:
    """The record of a segment, with the same name and recording in every dataset.

    whole_videos: whether a file named without times is the whole video, and to be cut, or the segment itself.
    """
    path, is_cut = find(found, ytid, start_seconds)
    must_cut = path is not None and not is_cut and whole_videos
    return Record(
        name=f"{ytid}_{_milliseconds(start_seconds)}",
        media=path,
        recording=youtube_recording(ytid),
        captions=captions,
        labels=labels,
        start_seconds=start_seconds if must_cut else None,
        end_seconds=end_seconds if must_cut else None,
    )


def _hash(ytid: str) -> int:
    # 30 bits: the smallest of Python's integers.
    return hash(ytid) & 0x3FFFFFFF


def _is_time(text: str, seconds: float) -> bool:
    return float(text) in (seconds, _milliseconds(seconds))


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
