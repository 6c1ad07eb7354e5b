"""AudioSet: segment lists, and whatever of their media could be fetched.

1. The list is read: three comment lines, then ``YTID, start, end, "label,label"``.
2. Each segment is looked up among the files of the media folder; one whose media is not there stays in, as missing.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from audiotext_dist.errors import UserError
from shards.record import Record
from shards.sources import youtube
from shards.sources.files import csv_lines


@dataclass(frozen=True, kw_only=True)
class AudioSetConfig:
    """AudioSet's segment lists and the folder their media was fetched into.

    segments: the list (also one of VGGSound in the same form). media: the folder, searched with all below
    it for {ytid}.*, {ytid}_{start}.* and {ytid}_{start}_{end}.*, with a Y before or without, in seconds or
    milliseconds. whole_videos: a file named without times is the whole video, and is cut; false takes it as
    the clip itself. class_labels: AudioSet's class_labels_indices.csv, to turn label ids into names.
    captions_from_labels: give each clip the caption "The sound of X and Y" instead of none.
    """

    segments: str
    media: str
    whole_videos: bool = True
    class_labels: str | None = None
    captions_from_labels: bool = False
    dataset: str = "audioset"


def records(config: AudioSetConfig) -> Iterator[Record]:
    """Every segment of the list, in its order; ``media`` is None where no file was found.

    Raises:
        UserError: a list or folder is not there, or a line cannot be read.
    """
    names = {} if config.class_labels is None else _class_names(config.class_labels)
    found = youtube.scan(config.media)
    shared: dict[tuple[str, ...], tuple[str, ...]] = {}
    for place, ytid, start, end, cell in _segments(config.segments):
        labels = _labels(cell, names, config, place)
        labels = shared.setdefault(labels, labels)  # Of millions of clips, most have the labels of another.
        yield youtube.segment(
            found,
            ytid,
            start,
            end,
            whole_videos=config.whole_videos,
            captions=(_caption(labels),) if config.captions_from_labels and labels else (),
            labels=labels,
        )


def _segments(path: str) -> Iterator[tuple[str, str, float, float, str]]:
    """(place for error messages, ytid, start and end in seconds, the cell of labels) of each line."""
    for place, cells in csv_lines(path, spaces_after_commas=True):
        if not cells or cells[0].startswith("#"):
            continue
        try:
            ytid, start, end = cells[0].strip(), youtube.seconds(cells[1]), youtube.seconds(cells[2])
        except (IndexError, ValueError):
            raise UserError(f"{place} is not 'YTID, start, end, \"labels\"': check segments=") from None
        yield place, ytid, start, end, ",".join(cells[3:])


def _labels(cell: str, names: dict[str, str], config: AudioSetConfig, place: str) -> tuple[str, ...]:
    # A comma with a space after it is part of a name ("Male speech, man speaking").
    labels = [label.strip() for label in re.split(r";|,(?! )", cell) if label.strip()]
    if names and (unknown := [label for label in labels if label not in names]):
        raise UserError(f"{place}: no label '{unknown[0]}' in {config.class_labels}: give the list's own labels")
    return tuple(names.get(label, sys.intern(label)) for label in labels)


def _class_names(path: str) -> dict[str, str]:
    lines = [cells for _, cells in csv_lines(path)]
    if not lines or lines[0] != ["index", "mid", "display_name"]:
        raise UserError(f"{path} does not begin with 'index,mid,display_name': check class_labels=")
    return {cells[1]: cells[2] for cells in lines[1:] if cells}


def _caption(labels: tuple[str, ...]) -> str:
    *others, last = (label.lower() for label in labels)
    return f"The sound of {', '.join(others)} and {last}" if others else f"The sound of {last}"
