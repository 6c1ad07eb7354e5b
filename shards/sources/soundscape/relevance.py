"""Which captions describe which clips: a fact of the world, not an estimate.

1. The facts of all clips become one table of codes, a row for each sounding.
2. A meaning is a row with gaps; it is true of the clips whose rows agree wherever it has no gap.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from audiotext_dist import storage
from audiotext_dist.data.sample import safe_key
from shards.sources.soundscape.captions import MEANING_FIELDS, Meaning
from shards.sources.soundscape.world import ClipScript, SoundscapeConfig

RELEVANCE_FILE = "relevance.jsonl"
UNSTATED = 0


@dataclass(frozen=True, kw_only=True)
class Relevance:
    """What one meaning describes.

    captions: (clip, caption number) of the captions that state it. clips: those it is true of, ascending.
    Clips are numbers into the list of scripts.
    """

    meaning: Meaning
    captions: list[tuple[int, int]]
    clips: list[int]


def relevance(scripts: Sequence[ClipScript]) -> Iterator[Relevance]:
    """Each distinct meaning of the clips' captions, in order of first use."""
    codes: dict[str | None, int] = {None: UNSTATED}

    def encoded(meaning: Meaning) -> list[int]:
        return [codes.setdefault(getattr(meaning, name), len(codes)) for name in MEANING_FIELDS]

    clips_of: defaultdict[str, list[int]] = defaultdict(list)
    rows_of: defaultdict[str, list[list[int]]] = defaultdict(list)
    captions_of: defaultdict[Meaning, list[tuple[int, int]]] = defaultdict(list)
    for clip, plan in enumerate(scripts):
        for fact in plan.facts():
            clips_of[fact.event].append(clip)
            rows_of[fact.event].append(encoded(fact))
        for number, caption in enumerate(plan.captions):
            captions_of[caption.meaning].append((clip, number))

    # An event sounds at most once in a clip's facts, so no clip comes twice.
    clips = {event: np.array(numbers) for event, numbers in clips_of.items()}
    rows = {event: np.array(table, np.int16) for event, table in rows_of.items()}
    for meaning, captions in captions_of.items():
        asked = np.array(encoded(meaning), np.int16)
        agree = ((rows[meaning.event] == asked) | (asked == UNSTATED)).all(axis=1)
        yield Relevance(meaning=meaning, captions=captions, clips=clips[meaning.event][agree].tolist())


def write_relevance(config: SoundscapeConfig, scripts: Sequence[ClipScript]) -> str:
    """Write ``relevance.jsonl`` into the media folder, a line for each distinct meaning.

    A line holds ``meaning`` (the stated fields), ``captions`` ([clip key, caption number] of those that state
    it) and ``clips`` (keys of the clips that it truly describes).

    Returns:
        the file's path.
    """
    keys = [safe_key(plan.name) for plan in scripts]
    lines = [
        json.dumps(
            {
                "meaning": entry.meaning.stated(),
                "captions": [[keys[clip], number] for clip, number in entry.captions],
                "clips": [keys[clip] for clip in entry.clips],
            },
            separators=(",", ":"),
        )
        for entry in relevance(scripts)
    ]
    path = storage.join(config.media, RELEVANCE_FILE)
    storage.write_bytes(path, "\n".join([*lines, ""]).encode())
    return path
