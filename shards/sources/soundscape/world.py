"""The plan of a clip, drawn from the configuration's seed: nothing is rendered here.

1. ``random_state`` gives every clip its own random streams, so a clip never depends on the others.
2. ``script`` draws the events with their attributes and quarters, what the pictures of each quarter show,
   the background, and the captions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from audiotext_dist import storage
from audiotext_dist.errors import UserError
from shards.sources.soundscape.captions import (
    ATTRIBUTE_VALUES,
    BACKGROUNDS,
    EVENTS,
    Caption,
    Meaning,
    draw_captions,
)

CLIP_SECONDS = 10.0
NUM_QUARTERS = 4
QUARTER_SECONDS = CLIP_SECONDS / NUM_QUARTERS

SECOND_EVENT_CHANCE = 0.25
BARE_SCENE_CHANCE = 0.25


@dataclass(frozen=True, kw_only=True)
class SoundscapeConfig:
    """Procedural clips with sound, pictures and captions, needing no download.

    media: folder the media files are written to, one configuration a folder. split: names the clips and
    enters the random state, so splits of one seed share no clip. temporal_disagreement: the share of
    quarters without an event whose pictures show a distractor; in the others they show the main event.
    """

    media: str
    num_clips: int = 1000
    seed: int = 0
    split: str = "train"
    temporal_disagreement: float = 1.0
    num_captions: int = 5
    sample_rate_hz: int = 16000
    picture_pixels: int = 64

    def __post_init__(self) -> None:
        if storage.is_remote(self.media):
            raise UserError(f"media={storage.public_name(self.media)} is remote: give a local folder")
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,60}", self.split):
            raise UserError(f"split='{self.split}': use up to 60 letters, digits, '_' and '-'")
        if self.num_clips < 1:
            raise UserError(f"num_clips={self.num_clips}: at least 1 is needed")
        if not 0.0 <= self.temporal_disagreement <= 1.0:
            raise UserError(f"temporal_disagreement={self.temporal_disagreement}: give a share from 0 to 1")
        if not 1 <= self.num_captions <= 20:
            raise UserError(f"num_captions={self.num_captions}: give a number from 1 to 20")
        if self.sample_rate_hz < 16000:
            raise UserError(f"sample_rate_hz={self.sample_rate_hz}: the sounds need 16000 or more")
        if self.picture_pixels < 32 or self.picture_pixels % 2:
            raise UserError(f"picture_pixels={self.picture_pixels}: give an even number from 32 on")


@dataclass(frozen=True, kw_only=True)
class Sounding:
    """An event as it sounds in a clip: its class, its attributes, the quarters (0 to 3, ascending)."""

    event: str
    pitch: str
    rate: str
    loudness: str
    quarters: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ClipScript:
    """The plan of one clip.

    sounds: the main event, then perhaps a second one in a quarter of its own. shown: for each quarter the event
    that its pictures show, or None for the bare scene of the background.
    """

    name: str
    sounds: tuple[Sounding, ...]
    background: str
    shown: tuple[str | None, ...]
    captions: tuple[Caption, ...]

    def kinds_shown(self) -> tuple[Literal["event", "background", "distractor"], ...]:
        """For each quarter, what its pictures show: an event of the clip, its background, or what is not heard."""
        heard = {sound.event for sound in self.sounds}
        return tuple(
            "background" if shown is None else "event" if shown in heard else "distractor" for shown in self.shown
        )

    def facts(self) -> list[Meaning]:
        """All that is true of the clip: a fully stated meaning for each sounding, the main event's first."""
        return _facts(self.sounds, self.background)


def script(config: SoundscapeConfig, number: int) -> ClipScript:
    """The plan of the clip with this number; the same for any ``num_clips``.

    ``temporal_disagreement`` changes only ``shown``: events, attributes, background and captions stay.
    """
    draw = random_state(config, number, "script")
    main, second, *distractors = draw.sample(EVENTS, 2 + NUM_QUARTERS)
    quarters = draw.sample(range(NUM_QUARTERS), NUM_QUARTERS)
    num_main = draw.randint(1, 2)
    sounds = [_sounding(main, quarters[:num_main], draw)]
    if draw.random() < SECOND_EVENT_CHANCE:
        sounds.append(_sounding(second, [quarters[num_main]], draw))
    background = draw.choice(BACKGROUNDS)

    sounding_in = {quarter: sound.event for sound in sounds for quarter in sound.quarters}
    shown: list[str | None] = []
    for quarter in range(NUM_QUARTERS):
        # Both are drawn for every quarter, so that temporal_disagreement cannot shift later draws.
        disagrees = draw.random() < config.temporal_disagreement
        distractor = None if draw.random() < BARE_SCENE_CHANCE else distractors[quarter]
        shown.append(sounding_in.get(quarter, distractor if disagrees else main))
    return ClipScript(
        name=f"soundscape-{config.split}-{number:06d}",
        sounds=tuple(sounds),
        background=background,
        shown=tuple(shown),
        captions=draw_captions(
            _facts(sounds, background), config.num_captions, random_state(config, number, "captions")
        ),
    )


def random_state(config: SoundscapeConfig, number: int, purpose: str) -> Random:
    """A clip's own random stream for one purpose."""
    return Random(f"{config.seed}/{config.split}/{number}/{purpose}")


def _sounding(event: str, quarters: list[int], draw: Random) -> Sounding:
    return Sounding(
        event=event,
        pitch=draw.choice(ATTRIBUTE_VALUES["pitch"]),
        rate=draw.choice(ATTRIBUTE_VALUES["rate"]),
        loudness=draw.choice(ATTRIBUTE_VALUES["loudness"]),
        quarters=tuple(sorted(quarters)),
    )


def _facts(sounds: Sequence[Sounding], background: str) -> list[Meaning]:
    others = {sound.event: other.event for sound in sounds for other in sounds if other is not sound}
    return [
        Meaning(
            event=sound.event,
            pitch=sound.pitch,
            rate=sound.rate,
            loudness=sound.loudness,
            duration="brief" if len(sound.quarters) == 1 else "long",
            other_event=others.get(sound.event),
            background=background,
        )
        for sound in sounds
    ]
