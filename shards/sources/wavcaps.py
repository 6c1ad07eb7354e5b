"""WavCaps: machine-written captions for four collections of sounds, with lists of what to leave out.

1. The exclusion lists are read as sets of recordings, whatever they call them.
2. A part's JSON is read: ``{"data": [{"id": ..., "caption": ...}, ...]}``.
3. Each clip is looked up among the files of the media folder. One that an exclusion list names stays in, marked.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from audiotext_dist.data.sample import freesound_recording, youtube_recording
from audiotext_dist.errors import UserError
from shards.record import Record
from shards.sources import files, youtube

Subset = Literal["AudioSet_SL", "BBC_Sound_Effects", "FreeSound", "SoundBible"]

# The list says Y{ytid}.wav, the archive holds Y{ytid}.flac.
_AUDIOSET_ID = re.compile(r"Y([A-Za-z0-9_-]{11})\.(?:wav|flac)")


@dataclass(frozen=True, kw_only=True)
class WavCapsConfig:
    """One part of WavCaps.

    captions: the part's JSON. subset: which one it is. media: the folder of its clips, searched with all below
    it for {id}.* (AudioSet_SL: Y{ytid}.*). exclude: lists of clips to leave out, each a csv (DCASE's: the
    column id, or else the first, after a header) or one of WavCaps' black-list JSONs. A list that names no
    clip of the part is most often of another part: allow_unused_exclusions takes it all the same.
    """

    captions: str
    subset: Subset
    media: str
    exclude: list[str] = field(default_factory=list)
    allow_unused_exclusions: bool = False
    dataset: str = "wavcaps"


def records(config: WavCapsConfig) -> Iterator[Record]:
    """Every clip of the part, in the order of its list; ``media`` is None where no file was found.

    Raises:
        UserError: a list or folder is not there or cannot be read, or an exclusion list excludes nothing.
    """
    excluded = {path: _excluded_recordings(path) for path in config.exclude}
    find = _finder(config)
    num_excluded: Counter[str] = Counter()
    for place, clip_id, caption in _rows(config.captions):
        recording = _recording(config.subset, clip_id, place)
        excluded_by = tuple(path for path, recordings in excluded.items() if recording in recordings)
        num_excluded.update(excluded_by)
        yield Record(
            name=f"{config.subset}/{clip_id}",
            media=find(clip_id),
            recording=recording,
            captions=(caption,) if caption else (),
            excluded_by=excluded_by,
        )
    unused = [path for path in config.exclude if not num_excluded[path]]
    if unused and not config.allow_unused_exclusions:
        raise UserError(
            f"{unused[0]} excludes no clip of {config.subset}: check it, or give allow_unused_exclusions=true"
        )


def _finder(config: WavCapsConfig) -> Callable[[str], str | None]:
    """The media folder, scanned: gives the file of an id of the part."""
    if config.subset != "AudioSet_SL":
        return files.scan_by_stem(config.media).get
    found = youtube.scan(config.media)
    return lambda clip_id: youtube.find(found, clip_id[1:12])[0]


def _recording(subset: Subset, clip_id: str, place: str) -> str:
    match subset:
        case "FreeSound":
            return freesound_recording(clip_id)
        case "AudioSet_SL":
            if match := _AUDIOSET_ID.fullmatch(clip_id):
                return youtube_recording(match.group(1))
            raise UserError(f"{place}: id {clip_id!r:.60} is not Y{{ytid}}.wav: check captions= and subset=")
        case _:
            return f"{subset}:{clip_id}"


def _rows(path: str) -> Iterator[tuple[str, str, str]]:
    """Each row's place, id and caption."""
    # FreeSound's descriptions and tags are most of its file: they are dropped while it is read.
    content = _json(path, lambda row: {key: row[key] for key in ("data", "id", "caption") if key in row})
    rows = content.get("data") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise UserError(f'{path} is not {{"data": [...]}}: give the JSON of one part of WavCaps')
    for number, row in enumerate(rows):
        place = f"{path} row {number}"
        if not isinstance(row, dict) or not isinstance(row.get("id"), str) or not isinstance(row.get("caption"), str):
            raise UserError(f"{place} has no 'id' and 'caption' that are texts: mend it")
        yield place, row["id"].strip(), row["caption"].strip()


def _excluded_recordings(path: str) -> set[str]:
    """The recordings that a list names."""
    if path.endswith(".csv"):
        lines = files.csv_lines(path)
        _, header = next(lines, ("", []))
        column = header.index("id") if "id" in header else 0
        ids = [cells[column] for _, cells in lines if len(cells) > column]
    else:
        content = _json(path)
        if not isinstance(content, dict) or not all(isinstance(ids, list) for ids in content.values()):
            raise UserError(f'{path} is not {{"AudioSet": [...], "FreeSound": [...]}}: give a black list, or a csv')
        ids = [str(clip_id) for part in content.values() for clip_id in part]
    return {recording for clip_id in ids if (recording := _listed_recording(clip_id.strip()))}


def _listed_recording(clip_id: str) -> str | None:
    """A bare number is a Freesound id, never one of SoundBible's. The published lists also hold "Not found"."""
    if clip_id.isdecimal():
        return freesound_recording(clip_id)
    match = _AUDIOSET_ID.fullmatch(clip_id)
    return youtube_recording(match.group(1)) if match else None


def _json(path: str, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    try:
        return json.loads(Path(path).read_text("utf-8-sig"), object_hook=object_hook)
    except OSError:
        raise UserError(f"no list at {path}: check the path") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): fetch it again") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply: fetch it again") from None
