"""What can be said of a clip: meanings, when they are true, and the sentences that state them.

1. Every sounding of a clip is a ``Meaning`` with every field stated: its facts.
2. A caption states a few of these facts: ``draw_captions`` picks them, ``phrase`` words them.
3. A meaning is true of a clip when all it states stands in one of the clip's facts: ``Meaning.holds``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from random import Random
from typing import NamedTuple


class Wording(NamedTuple):
    """How an event is named: as a clause ("a dog barks") and as a sound ("barking of a dog")."""

    clauses: tuple[str, ...]
    sounds: tuple[str, ...]


EVENT_WORDING = {
    "alarm": Wording(("an alarm beeps", "an alarm goes off"), ("beeping of an alarm", "beeps of an alarm")),
    "bell": Wording(("a bell rings", "a bell tolls"), ("ringing of a bell", "tolling of a bell")),
    "bird": Wording(("a bird chirps", "a bird sings"), ("chirping of a bird", "birdsong")),
    "cat": Wording(("a cat meows", "a cat is meowing"), ("meowing of a cat", "meows of a cat")),
    "clock": Wording(("a clock ticks", "a clock is ticking"), ("ticking of a clock", "clock ticking")),
    "cricket": Wording(("a cricket chirrs", "a cricket is stridulating"), ("chirring of a cricket", "cricket song")),
    "dog": Wording(("a dog barks", "a dog is barking"), ("barking of a dog", "barks of a dog")),
    "drill": Wording(("a drill whirs", "someone drills"), ("whirring of a drill", "drilling")),
    "drops": Wording(("water drips", "a tap is dripping"), ("dripping of water", "dripping of a tap")),
    "drum": Wording(("a drum is beaten", "somebody drums"), ("beating of a drum", "drumming")),
    "engine": Wording(("an engine runs", "a motor is running"), ("humming of an engine", "running of a motor")),
    "frog": Wording(("a frog croaks", "a frog is croaking"), ("croaking of a frog", "croaks of a frog")),
    "glass": Wording(("glass breaks", "glass shatters"), ("breaking of glass", "shattering of glass")),
    "horn": Wording(("a horn honks", "a car honks"), ("honking of a horn", "honking of a car")),
    "knock": Wording(("someone knocks on a door", "a door is knocked on"), ("knocking on a door", "knocks on a door")),
    "saw": Wording(("a saw cuts wood", "someone saws wood"), ("sawing of wood", "rasping of a saw")),
    "siren": Wording(("a siren wails", "a siren howls"), ("wailing of a siren", "howling of a siren")),
    "whistle": Wording(("a whistle blows", "someone whistles"), ("blowing of a whistle", "whistling")),
}
EVENTS = tuple(EVENT_WORDING)

BACKGROUND_WORDING = {
    "crowd": ("in a crowd", "among talking people", "with voices in the background"),
    "rain": ("in the rain", "while it rains", "with rainfall in the background"),
    "room": ("in a quiet room", "indoors", "with silence in the background"),
    "street": ("by a busy road", "on a street", "with traffic in the background"),
    "wind": ("in the wind", "while the wind blows", "with wind in the background"),
}
BACKGROUNDS = tuple(BACKGROUND_WORDING)

# "normal" is a value of the first three attributes that nobody remarks on: it has no words.
ATTRIBUTE_VALUES = {
    "pitch": ("low", "normal", "high"),
    "rate": ("slow", "normal", "fast"),
    "loudness": ("soft", "normal", "loud"),
    "duration": ("brief", "long"),
}
ADVERBS = {
    "low": ("in a low pitch", "deeply"),
    "high": ("in a high pitch", "shrilly"),
    "slow": ("slowly", "at a slow pace"),
    "fast": ("quickly", "rapidly", "at a fast pace"),
    "soft": ("softly", "quietly", "faintly"),
    "loud": ("loudly", "noisily", "at full volume"),
    "brief": ("briefly", "for a short moment"),
    "long": ("for a long time", "at length"),
}
ADJECTIVES = {
    "low": ("low-pitched", "deep"),
    "high": ("high-pitched", "shrill"),
    "slow": ("slow", "unhurried"),
    "fast": ("fast", "rapid", "quick"),
    "soft": ("soft", "quiet", "faint"),
    "loud": ("loud", "noisy", "booming"),
    "brief": ("brief", "short"),
    "long": ("long", "prolonged", "lasting"),
}

CLAUSE_TEMPLATES = ("{}", "here {}", "one can hear how {}", "at some point {}", "listen: {}", "at least once, {}")
SOUND_TEMPLATES = (
    "{}",
    "the sound of {}",
    "the {}",
    "{} can be heard",
    "a recording of {}",
    "we hear {}",
    "there is {}",
    "somebody recorded {}",
)
CLAUSE_JOINS = ("{} and {}", "{}, and at another time {}", "{}; {} too")
SOUND_JOINS = ("{} and the {}", "{} as well as the {}", "{} besides the {}")

# How many facts beyond the event a clip's 1st, 2nd, ... caption states: the first ones say most.
NUM_DETAILS = (3, 2, 2, 1, 1)
SECOND_EVENT_TOLD_CHANCE = 0.25


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """Facts about one event of a clip; None leaves a fact unstated.

    other_event: another event that sounds in the same clip. duration: "brief" for one quarter of the clip,
    "long" for two.
    """

    event: str
    pitch: str | None = None
    rate: str | None = None
    loudness: str | None = None
    duration: str | None = None
    other_event: str | None = None
    background: str | None = None

    def stated(self) -> dict[str, str]:
        """Field name -> value, of the fields that are stated."""
        values = {name: getattr(self, name) for name in MEANING_FIELDS}
        return {name: value for name, value in values.items() if value is not None}

    def holds(self, facts: Sequence[Meaning]) -> bool:
        """True if some one of a clip's facts has everything that this meaning states."""
        stated = self.stated().items()
        return any(all(getattr(fact, name) == value for name, value in stated) for fact in facts)


MEANING_FIELDS = tuple(entry.name for entry in fields(Meaning))


@dataclass(frozen=True, kw_only=True)
class Caption:
    """A sentence and what it states."""

    text: str
    meaning: Meaning


def draw_captions(facts: Sequence[Meaning], num_captions: int, draw: Random) -> tuple[Caption, ...]:
    """Captions of a clip, all true and all worded differently; the first ones say most.

    Args:
        facts: a fully stated meaning for each of the clip's events, the main event's first.
    """
    captions: dict[str, Caption] = {}
    while len(captions) < num_captions:
        tell_second = len(facts) > 1 and captions and draw.random() < SECOND_EVENT_TOLD_CHANCE
        fact = facts[1] if tell_second else facts[0]
        remarkable = [name for name, value in fact.stated().items() if name != "event" and value != "normal"]
        num_details = NUM_DETAILS[len(captions) % len(NUM_DETAILS)]
        told = draw.sample(remarkable, min(num_details, len(remarkable)))
        meaning = Meaning(event=fact.event, **{name: getattr(fact, name) for name in told})
        text = phrase(meaning, draw)
        captions.setdefault(text, Caption(text=text, meaning=meaning))
    return tuple(captions.values())


def phrase(meaning: Meaning, draw: Random) -> str:
    """One of the many sentences that state the meaning, and nothing beyond it."""
    values = [value for name in ATTRIBUTE_VALUES if (value := getattr(meaning, name)) is not None]
    draw.shuffle(values)
    as_clause = draw.random() < 0.5
    if as_clause:
        manner = _enumerated([draw.choice(ADVERBS[value]) for value in values])
        told = f"{draw.choice(EVENT_WORDING[meaning.event].clauses)} {manner}".rstrip()
    else:
        manner = ", ".join(draw.choice(ADJECTIVES[value]) for value in values)
        told = f"{manner} {draw.choice(EVENT_WORDING[meaning.event].sounds)}".lstrip()
    if meaning.other_event is not None:
        other = EVENT_WORDING[meaning.other_event]
        options, joins = (other.clauses, CLAUSE_JOINS) if as_clause else (other.sounds, SOUND_JOINS)
        told = draw.choice(joins).format(told, draw.choice(options))
    told = draw.choice(CLAUSE_TEMPLATES if as_clause else SOUND_TEMPLATES).format(told)
    if meaning.background is not None:
        place = draw.choice(BACKGROUND_WORDING[meaning.background])
        place_first = as_clause and draw.random() < 0.5
        told = f"{place}, {told}" if place_first else f"{told} {place}"
    return told[0].upper() + told[1:]


def _enumerated(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))
