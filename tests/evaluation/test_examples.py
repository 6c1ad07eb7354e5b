"""The fixed queries of an evaluation: which they are, what is said of them, and what a person sees and hears."""

import json

import numpy as np
import pytest
import soundfile
from PIL import Image

from audiotext_dist.data.sets import DataConfig
from audiotext_dist.data.shard import load_shards
from audiotext_dist.evaluation.examples import Rows, choose_examples, write_examples
from audiotext_dist.evaluation.spectrogram import spectrogram
from tests.clips import SAMPLE_RATE_HZ, make_sample, write_shards

KEYS = [f"clip-{number:04d}" for number in range(40)]
DATA = DataConfig(sample_rate_hz=SAMPLE_RATE_HZ, clip_seconds=0.5, num_frames=4)


def examples_of(keys, num_examples=16, items=None, right=None):
    """Two captions a clip, each of which points at its own clip alone."""
    own = np.eye(len(keys), dtype=np.float32)
    numbers = np.arange(len(keys))
    queries = Rows(np.repeat(own, 2, axis=0), np.repeat(numbers, 2))
    right = [np.array([clip]) for clip in queries.clip_R] if right is None else right
    return choose_examples(keys, queries, items or Rows(own, numbers), right, num_examples)


def test_the_queries_are_the_same_whatever_the_order_of_the_clips():
    chosen = examples_of(KEYS)
    assert len({example.clip for example in chosen}) == 16
    again = examples_of(KEYS[::-1])
    assert [(one.clip, one.number) for one in again] == [(one.clip, one.number) for one in chosen]
    # A set that grows keeps most of them, and a small one gives what it has.
    assert [example.clip for example in examples_of(KEYS, 4)] == [example.clip for example in chosen[:4]]
    assert len(examples_of(KEYS[:3])) == 3
    assert examples_of(KEYS, 0) == []


def test_each_query_finds_its_own_clip_first():
    for example in examples_of(KEYS):
        assert example.rank == 1
        assert [(found.clip, found.score, found.is_right) for found in example.found[:1]] == [(example.clip, 1.0, True)]
        assert [found.is_right for found in example.found[1:]] == [False] * 4


def test_a_collapsed_model_finds_nothing():
    ones = Rows(np.ones((len(KEYS), len(KEYS)), np.float32), np.arange(len(KEYS)))
    assert {example.rank for example in examples_of(KEYS, items=ones)} == {len(KEYS)}


def test_a_clip_with_several_items_is_found_once_where_its_best_one_is():
    own = np.eye(len(KEYS), dtype=np.float32)
    items = Rows(np.concatenate([own, 0.5 * own]), np.tile(np.arange(len(KEYS)), 2))
    right = [np.array([clip, len(KEYS) + clip]) for clip in np.repeat(np.arange(len(KEYS)), 2)]
    for example in examples_of(KEYS, items=items, right=right):
        assert [found.is_right for found in example.found] == [True, *[False] * 4]
        assert len({found.clip for found in example.found}) == 5


@pytest.mark.parametrize("task", ["audio-text", "audio-image", "image-text"])
def test_a_person_sees_and_hears_the_queries(tmp_path, task):
    write_shards(tmp_path / "shards", [[make_sample(number) for number in part] for part in ((0, 1, 2), (3, 4, 5))])
    keys = [f"clip-{number:04d}" for number in range(6)]
    chosen = examples_of(keys, 2)
    rows = write_examples(chosen, task, "own", load_shards(str(tmp_path / "shards")), DATA, tmp_path)
    lines = json.loads((tmp_path / "examples" / "own" / "queries.json").read_text())
    assert [line["clip"] for line in lines] == [row["clip"] for row in rows] == [example.clip for example in chosen]
    assert [line["found"][0]["is_right"] for line in lines] == [True, True]
    number = int(chosen[0].clip.removeprefix("clip-"))
    sheet = Image.open(tmp_path / "examples" / "own" / "queries.png")
    assert sheet.width == 1000
    assert len(np.unique(np.asarray(sheet))) > 50
    if task.endswith("text"):
        assert rows[0]["query"] == lines[0]["query"] == make_sample(number).metadata.text[chosen[0].number]
    assert rows[0]["top 1"].startswith("right 1.000")
    assert ("frame" in rows[0]) == ("image" in task)
    assert ("audio" in rows[0]) == ("audio" in task)
    if "audio" in task:
        heard, rate = soundfile.read(rows[0]["audio"])
        assert (len(heard), rate) == (SAMPLE_RATE_HZ // 2, SAMPLE_RATE_HZ)
        # The clip's own pitch, which its number tells.
        pitch = np.abs(np.fft.rfft(heard)).argmax() * rate / len(heard)
        assert pitch == pytest.approx(200 + 37 * number, abs=4)
        assert Image.open(rows[0]["spectrogram"]).size == (480, 200)


def test_a_full_disk_costs_the_examples_and_no_more(tmp_path, caplog):
    write_shards(tmp_path / "shards", [[make_sample(number) for number in range(3)]])
    (tmp_path / "examples").write_text("no folder can be made here")
    shards = load_shards(str(tmp_path / "shards"))
    assert write_examples(examples_of(KEYS[:3]), "audio-text", "own", shards, DATA, tmp_path) == []
    assert "the examples of own are not written" in caplog.text


def test_a_higher_tone_stands_higher():
    rate = 16000
    time = np.arange(rate, dtype=np.float32) / rate
    levels = [
        np.asarray(spectrogram(np.sin(2 * np.pi * hz * time), rate, 40, 60)).sum(axis=(1, 2)).argmax()
        for hz in (300, 1000, 4000)
    ]
    # Rows count from the top; 1000 on the mel axis of 60 rows up to 8 kHz lies at 60 * (1 - 922 / 2762) or so.
    assert levels[0] > levels[1] > levels[2]
    assert levels[1] == pytest.approx(60 * (1 - 922 / 2762), abs=2)
