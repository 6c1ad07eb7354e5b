"""AudioCaps: captions of AudioSet clips.

1. The list is read: ``audiocap_id,youtube_id,start_time,caption``. Training clips have one row each, those of
   validation and test five; the rows of one clip become one record with all its captions.
2. Each clip is looked up among the files of the media folder, as AudioSet's segments are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from audiotext_dist.errors import UserError
from shards.record import Record
from shards.sources import youtube
from shards.sources.files import csv_rows

CLIP_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class AudioCapsConfig:
    """One of AudioCaps' lists and the folder its media was fetched into.

    captions: train.csv, val.csv or test.csv. media: the folder, searched with all below it for {ytid}.*,
    {ytid}_{start}.* and {ytid}_{start}_{end}.*, with a Y before or without, in seconds or milliseconds.
    whole_videos: a file named without times is the whole video, and is cut; false takes it as the clip itself.
    """

    captions: str
    media: str
    whole_videos: bool = True
    dataset: str = "audiocaps"


def records(config: AudioCapsConfig) -> Iterator[Record]:
    """Every clip, in the order of its first row; ``media`` is None where no file was found.

    Raises:
        UserError: the list or folder is not there, or a row cannot be read.
    """
    found = youtube.scan(config.media)
    captions: dict[tuple[str, float], list[str]] = {}
    for place, row in csv_rows(config.captions, ("youtube_id", "start_time", "caption")):
        try:
            start = youtube.seconds(row["start_time"])
        except ValueError:
            raise UserError(f"{place}: '{row['start_time']}' is no start in seconds: mend the cell") from None
        of_clip = captions.setdefault((row["youtube_id"].strip(), start), [])
        if caption := row["caption"].strip():
            of_clip.append(caption)
    for (ytid, start), texts in captions.items():
        yield youtube.segment(
            found, ytid, start, start + CLIP_SECONDS, whole_videos=config.whole_videos, captions=texts
        )
