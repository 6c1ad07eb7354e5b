"""The embedded corpus: the law of its world, the truth of its captions."""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from audiotext_dist.configuration import parse
from audiotext_dist.errors import UserError
from shards.sources.soundscape import ClipScript, SoundscapeConfig, script, write_relevance
from shards.sources.soundscape.captions import BACKGROUNDS, EVENTS, Meaning, phrase
from shards.sources.soundscape.pictures import DRAWINGS
from shards.sources.soundscape.relevance import relevance
from shards.sources.soundscape.sounds import BACKGROUND_SOUNDS, EVENT_SOUNDS
from shards.sources.soundscape.world import Sounding

configs = st.builds(
    SoundscapeConfig,
    media=st.just("unused"),
    seed=st.integers(),
    split=st.sampled_from(["train", "val", "test"]),
    temporal_disagreement=st.floats(0, 1),
    num_captions=st.integers(1, 20),
)
numbers = st.integers(0, 100_000)


def scripts_of(num_clips: int, **options: Any) -> list[ClipScript]:
    config = SoundscapeConfig(media="unused", **options)
    return [script(config, number) for number in range(num_clips)]


class TestScript:
    @given(config=configs, number=numbers)
    def test_events_sound_in_one_or_two_quarters_of_their_own(self, config: SoundscapeConfig, number: int) -> None:
        plan = script(config, number)
        quarters = [quarter for sound in plan.sounds for quarter in sound.quarters]
        assert len(quarters) == len(set(quarters))
        assert set(quarters) <= {0, 1, 2, 3}
        assert all(len(sound.quarters) in (1, 2) for sound in plan.sounds)
        assert len({sound.event for sound in plan.sounds}) == len(plan.sounds)

    @given(config=configs, number=numbers)
    def test_under_full_disagreement_only_sounding_quarters_show_the_event(
        self, config: SoundscapeConfig, number: int
    ) -> None:
        plan = script(dataclasses.replace(config, temporal_disagreement=1.0), number)
        for sound in plan.sounds:
            assert sound.quarters == tuple(q for q, event in enumerate(plan.shown) if event == sound.event)

    @given(config=configs, number=numbers)
    def test_without_disagreement_every_other_quarter_shows_the_main_event(
        self, config: SoundscapeConfig, number: int
    ) -> None:
        plan = script(dataclasses.replace(config, temporal_disagreement=0.0), number)
        second_quarters = {quarter for sound in plan.sounds[1:] for quarter in sound.quarters}
        assert all(plan.shown[quarter] == plan.sounds[0].event for quarter in {0, 1, 2, 3} - second_quarters)

    @given(config=configs, number=numbers, share=st.floats(0, 1))
    def test_disagreement_changes_nothing_but_what_is_shown(
        self, config: SoundscapeConfig, number: int, share: float
    ) -> None:
        plan = script(config, number)
        other = script(dataclasses.replace(config, temporal_disagreement=share), number)
        assert dataclasses.replace(other, shown=plan.shown) == plan

    @given(config=configs, number=numbers)
    def test_a_quarter_that_disagrees_shows_the_same_distractor_at_any_share(
        self, config: SoundscapeConfig, number: int
    ) -> None:
        plan = script(config, number)
        full = script(dataclasses.replace(config, temporal_disagreement=1.0), number)
        main = plan.sounds[0].event
        assert all(shown in (main, distractor) for shown, distractor in zip(plan.shown, full.shown, strict=True))

    def test_the_share_of_distractors_is_the_one_asked_for(self) -> None:
        disagreeing = [
            event != plan.sounds[0].event
            for plan in scripts_of(1000, temporal_disagreement=0.3)
            for quarter, event in enumerate(plan.shown)
            if not any(quarter in sound.quarters for sound in plan.sounds)
        ]
        assert np.mean(disagreeing) == pytest.approx(0.3, abs=0.04)

    def test_facts_tell_each_sounding_whole(self) -> None:
        def sounding(event: str, *quarters: int) -> Sounding:
            return Sounding(event=event, pitch="low", rate="normal", loudness="loud", quarters=quarters)

        sounds = (sounding("dog", 0, 3), sounding("bell", 1))
        plan = dataclasses.replace(scripts_of(1)[0], sounds=sounds, background="rain")
        common = {"pitch": "low", "rate": "normal", "loudness": "loud", "background": "rain"}
        assert plan.facts() == [
            Meaning(event="dog", duration="long", other_event="bell", **common),
            Meaning(event="bell", duration="brief", other_event="dog", **common),
        ]
        assert dataclasses.replace(plan, sounds=sounds[:1]).facts()[0].other_event is None

    def test_seeds_and_splits_share_no_plan(self) -> None:
        plans = [
            (plan.sounds, plan.shown, plan.captions)
            for options in ({}, {"seed": 1}, {"split": "val"})
            for plan in scripts_of(100, **options)
        ]
        assert not any(one == other for one, other in itertools.combinations(plans, 2))

    def test_every_class_can_be_heard_seen_and_told(self) -> None:
        assert set(EVENTS) == set(EVENT_SOUNDS) == set(DRAWINGS)
        assert set(BACKGROUNDS) == set(BACKGROUND_SOUNDS)
        plans = scripts_of(300)
        assert {plan.sounds[0].event for plan in plans} == set(EVENTS)
        assert {plan.background for plan in plans} == set(BACKGROUNDS)


class TestCaptions:
    @given(config=configs, number=numbers)
    def test_a_clips_captions_are_true_of_it_and_differ(self, config: SoundscapeConfig, number: int) -> None:
        plan = script(config, number)
        assert all(caption.meaning.holds(plan.facts()) for caption in plan.captions)
        assert len({caption.text for caption in plan.captions}) == config.num_captions

    def test_a_meaning_holds_only_if_all_it_states_is_of_one_event(self) -> None:
        facts = [
            Meaning(event="dog", pitch="low", loudness="loud", other_event="bell", background="rain"),
            Meaning(event="bell", pitch="high", loudness="soft", other_event="dog", background="rain"),
        ]
        assert Meaning(event="bell", pitch="high", background="rain").holds(facts)
        assert Meaning(event="bell", other_event="dog").holds(facts)
        assert not Meaning(event="dog", pitch="high").holds(facts)
        assert not Meaning(event="dog", background="wind").holds(facts)
        assert not Meaning(event="cat").holds(facts)

    @given(draw=st.randoms(use_true_random=False))
    def test_a_sentence_tells_every_stated_fact_and_no_other(self, draw: Any) -> None:
        meaning = Meaning(event="dog", loudness="loud", other_event="bell", background="rain")
        told = phrase(meaning, draw).lower()
        for words in (("bark",), ("loud", "nois", "full volume", "booming"), ("bell",), ("rain",)):
            assert any(word in told for word in words), told
        for word in ("pitch", "deep", "quick", "slow", "brief", "short", "long", "quiet", "wind"):
            assert word not in told

    def test_a_caption_usually_describes_several_clips(self) -> None:
        described = [len(entry.clips) for entry in relevance(scripts_of(300)) for _ in entry.captions]
        assert statistics.median(described) >= 3


class TestRelevance:
    def test_equals_asking_every_clip_about_every_caption(self) -> None:
        plans = scripts_of(60)
        expected: dict[Meaning, list[tuple[int, int]]] = {}
        for clip, plan in enumerate(plans):
            for number, caption in enumerate(plan.captions):
                expected.setdefault(caption.meaning, []).append((clip, number))
        found = list(relevance(plans))
        assert {entry.meaning: entry.captions for entry in found} == expected
        for entry in found:
            assert entry.clips == [clip for clip, plan in enumerate(plans) if entry.meaning.holds(plan.facts())]

    def test_the_file_names_clips_by_key_and_captions_by_number(self, tmp_path: Path) -> None:
        plans = {plan.name: plan for plan in scripts_of(3)}
        write_relevance(SoundscapeConfig(media=str(tmp_path)), list(plans.values()))
        entries = [json.loads(line) for line in (tmp_path / "relevance.jsonl").read_text().splitlines()]
        named = [(key, number) for entry in entries for key, number in entry["captions"]]
        assert sorted(named) == [(key, number) for key in sorted(plans) for number in range(5)]
        for entry in entries:
            meaning = Meaning(**entry["meaning"])
            assert all(plans[key].captions[number].meaning == meaning for key, number in entry["captions"])
            assert entry["clips"] == [key for key, plan in plans.items() if meaning.holds(plan.facts())]


@pytest.mark.parametrize(
    "word",
    [
        "media=s3://bucket/soundscape",
        "num_clips=0",
        "split=a/b",
        "temporal_disagreement=1.5",
        "num_captions=0",
        "sample_rate_hz=8000",
        "picture_pixels=63",
    ],
)
def test_impossible_configurations_name_the_key(word: str) -> None:
    with pytest.raises(UserError, match=word.partition("=")[0]):
        parse(SoundscapeConfig, ["media=unused", word])


def test_the_media_folder_is_required() -> None:
    with pytest.raises(UserError, match="media"):
        parse(SoundscapeConfig, [])
