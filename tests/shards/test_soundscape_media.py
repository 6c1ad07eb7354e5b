"""The embedded corpus: its sounds, its pictures and the bytes of its media files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from audiotext_dist.errors import UserError
from shards.sources.soundscape import SoundscapeConfig, records, script
from shards.sources.soundscape.captions import EVENTS
from shards.sources.soundscape.media import read_script
from shards.sources.soundscape.pictures import render_pictures
from shards.sources.soundscape.sounds import EVENT_RMS, EVENT_SOUNDS, Take, render_audio
from shards.sources.soundscape.world import random_state

QUARTER_SAMPLES = 40_000


def config_in(folder: Path, **options: Any) -> SoundscapeConfig:
    return SoundscapeConfig(**{"media": str(folder), "num_clips": 3, **options})


def media_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.mkv"))}


def build(config: SoundscapeConfig, num_workers: int = 1) -> dict[str, bytes]:
    assert len(list(records(config, num_workers))) == config.num_clips
    return media_in(Path(config.media))


def decoded(path: Path) -> tuple[Any, Any, list[float]]:
    """(int16 [samples], uint8 [pictures, height, width, 3], seconds of each picture)."""
    with av.open(str(path)) as container:
        audio = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return audio, np.stack([frame.to_ndarray(format="rgb24") for frame in frames]), [frame.time for frame in frames]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips of the default configuration."""
    folder = tmp_path_factory.mktemp("soundscape")
    build(config_in(folder))
    return folder


class TestSound:
    @pytest.mark.parametrize("event", EVENTS)
    @pytest.mark.parametrize("factor", [0.5, 1.8])
    def test_every_event_sounds_at_every_pitch_and_rate(self, event: str, factor: float) -> None:
        rng = np.random.default_rng(0)
        sound = EVENT_SOUNDS[event](Take(rng=rng, pitch=factor, rate=factor, seconds=2.0, sample_rate_hz=16000))
        assert sound.shape == (32_000,)
        assert np.isfinite(sound).all()
        loud_halves = np.abs(sound.reshape(2, -1)).max(axis=1)
        assert loud_halves.min() > 0.2 * loud_halves.max()

    @pytest.mark.parametrize("number", range(20))
    def test_sounding_quarters_are_louder_than_the_others(self, number: int) -> None:
        plan = script(SoundscapeConfig(media="unused"), number)
        audio = render_audio(plan, np.random.default_rng(number), sample_rate_hz=16000)
        assert audio.shape == (4 * QUARTER_SAMPLES,)
        rms = np.sqrt(np.mean(audio.reshape(4, QUARTER_SAMPLES).astype(float) ** 2, axis=1))
        sounding = {quarter for sound in plan.sounds for quarter in sound.quarters}
        assert min(rms[list(sounding)]) > 2 * max(rms[list({0, 1, 2, 3} - sounding)])

    def test_loudness_is_heard(self) -> None:
        plan = script(SoundscapeConfig(media="unused"), 0)
        levels = []
        for loudness in EVENT_RMS:
            sounds = tuple(dataclasses.replace(sound, loudness=loudness) for sound in plan.sounds)
            audio = render_audio(dataclasses.replace(plan, sounds=sounds), np.random.default_rng(0), 16000)
            levels.append(np.mean(audio.astype(float) ** 2))
        assert levels[0] * 2 < levels[1]
        assert levels[1] * 2 < levels[2]


class TestPictures:
    def test_pictures_show_what_the_script_says(self) -> None:
        config = SoundscapeConfig(media="unused")
        plan = script(config, 0)
        bare = dataclasses.replace(plan, shown=(None, None, None, None))
        shown = dataclasses.replace(plan, shown=(None, "dog", None, "cat"))
        scene, pictures = (render_pictures(p, random_state(config, 0, "pictures"), 64) for p in (bare, shown))
        assert pictures.shape == (20, 64, 64, 3)
        changed = (pictures != scene[0]).any(axis=-1).mean(axis=(1, 2))
        assert not changed[[0, 1, 2, 3, 4, 10, 11, 12, 13, 14]].any()
        assert (changed[[5, 6, 7, 8, 9, 15, 16, 17, 18, 19]] > 0.05).all()

    def test_an_event_covers_the_same_share_of_a_picture_of_any_size(self) -> None:
        config = SoundscapeConfig(media="unused")
        plan = dataclasses.replace(script(config, 0), shown=(None, "dog", "dog", "dog"))
        covered = []
        for pixels in (32, 64, 160):
            pictures = render_pictures(plan, random_state(config, 0, "pictures"), pixels)
            assert pictures.shape == (20, pixels, pixels, 3)
            covered.append((pictures[5:] != pictures[0]).any(axis=-1).mean())
        assert covered == pytest.approx([covered[0]] * 3, rel=0.25)
        assert 0.1 < covered[0] < 0.3


class TestMedia:
    def test_bytes_depend_on_neither_the_number_of_clips_nor_of_workers(self, folder: Path, tmp_path: Path) -> None:
        more = build(config_in(tmp_path, num_clips=20, num_captions=2), num_workers=2)
        assert media_in(folder).items() < more.items()

    @pytest.mark.parametrize("options", [{"seed": 1}, {"split": "val"}])
    def test_another_seed_or_split_shares_no_media(self, folder: Path, tmp_path: Path, options: Any) -> None:
        assert not set(media_in(folder).values()) & set(build(config_in(tmp_path, **options)).values())

    def test_disagreement_leaves_the_sound_alone(self, folder: Path, tmp_path: Path) -> None:
        build(config_in(tmp_path, temporal_disagreement=0.0))
        for one, other in zip(sorted(folder.glob("*.mkv")), sorted(tmp_path.glob("*.mkv")), strict=True):
            np.testing.assert_array_equal(decoded(one)[0], decoded(other)[0])

    def test_files_hold_the_rendered_sound_and_pictures(self, folder: Path) -> None:
        config = config_in(folder)
        for number, record in enumerate(records(config, num_workers=1)):
            assert record.media is not None
            audio, pictures, picture_times = decoded(record.media)
            rng = np.random.default_rng(random_state(config, number, "sound").getrandbits(128))
            np.testing.assert_array_equal(audio, render_audio(script(config, number), rng, 16000))
            assert audio.shape == (160_000,)
            assert picture_times == [0.5 * picture for picture in range(20)]
            rendered = render_pictures(script(config, number), random_state(config, number, "pictures"), 64)
            assert np.abs(pictures.astype(float) - rendered).mean() < 8

    def test_records_name_the_clips(self, folder: Path) -> None:
        for number, record in enumerate(records(config_in(folder), num_workers=1)):
            plan = script(config_in(folder), number)
            assert record.name == f"soundscape-train-{number:06d}"
            assert record.media == str(folder / f"{record.name}.mkv")
            assert record.recording == f"soundscape:0:train:{number}"
            assert record.captions == [caption.text for caption in plan.captions]
            assert record.labels == [sound.event for sound in plan.sounds]

    def test_relevance_stands_beside_the_media(self, folder: Path) -> None:
        assert (folder / "relevance.jsonl").read_text().count("soundscape-train-000002") >= 5

    def test_interrupted_generation_goes_on_where_it_stopped(self, folder: Path, tmp_path: Path) -> None:
        stopped = records(config_in(tmp_path), num_workers=1)
        first = next(stopped)
        stopped.close()
        assert len(media_in(tmp_path)) == 1
        assert first.media is not None
        written = Path(first.media).stat()
        assert build(config_in(tmp_path)) == media_in(folder)
        assert Path(first.media).stat() == written

    def test_a_folder_of_another_configuration_is_refused(self, folder: Path) -> None:
        with pytest.raises(UserError, match="give another media folder"):
            next(records(config_in(folder, temporal_disagreement=0.5), num_workers=1))


class TestScript:
    def test_a_media_folder_knows_the_plan_of_each_clip(self, folder: Path) -> None:
        for number in range(3):
            plan = script(config_in(folder), number)
            assert read_script(str(folder), plan.name) == plan

    @pytest.mark.parametrize("name", ["soundscape-test-000001", "soundscape-train-1", "soundscape-train-x", "other"])
    def test_a_clip_of_another_set_is_refused(self, folder: Path, name: str) -> None:
        with pytest.raises(UserError, match=f"does not hold clip {name}"):
            read_script(str(folder), name)

    def test_a_folder_without_a_soundscape_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="holds no soundscape of this version"):
            read_script(str(tmp_path), "soundscape-train-000001")

    def test_what_is_shown_is_an_event_the_background_or_a_distractor(self) -> None:
        config = SoundscapeConfig(media="unused")
        met = set()
        for plan in (script(config, number) for number in range(50)):
            for quarter, (shown, kind) in enumerate(zip(plan.shown, plan.kinds_shown(), strict=True)):
                met.add(kind)
                if any(quarter in sound.quarters for sound in plan.sounds):
                    assert kind == "event"
                else:
                    assert kind == ("background" if shown is None else "distractor")
        assert met == {"event", "background", "distractor"}
