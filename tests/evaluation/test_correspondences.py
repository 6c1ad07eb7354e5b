"""Estimated correspondences: average precision, the mass of targets, and the command on small features."""

import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from audiotext_dist.data.encoders import Encoder
from audiotext_dist.data.feature_files import OFFSETS, FeatureHeader, content_sha256
from audiotext_dist.data.shard import load_shards
from audiotext_dist.errors import UserError
from audiotext_dist.evaluation.correspondences import (
    Batches,
    Said,
    annotated,
    average_precision,
    chance,
    judge,
    read_said,
    truth,
    truth_of_labels,
)
from launch import correspondences
from tests.clips import make_sample, write_shards

NUM_CLIPS = 6


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1).filter(lambda pairs: any(b for _, b in pairs)))
def test_average_precision_is_its_definition(pairs):
    ranked = sorted(pairs, key=lambda pair: (-pair[0], pair[1]))
    precisions = [sum(true for _, true in ranked[: k + 1]) / (k + 1) for k, (_, true) in enumerate(ranked) if true]
    scores, is_true = (np.array(side) for side in zip(*pairs, strict=True))
    assert average_precision(scores.astype(np.float32), is_true) == pytest.approx(np.mean(precisions))


def write_features(folder, name, turn):
    """A teacher to whom clip i sounds as caption 0 of clip i + turn reads; captions 1 are like nothing."""
    index = load_shards(str(folder))[0].index
    text = np.zeros((2 * NUM_CLIPS, 2 * NUM_CLIPS), np.float32)
    text[::2, :NUM_CLIPS], text[1::2, NUM_CLIPS:] = np.eye(NUM_CLIPS), np.eye(NUM_CLIPS)
    audio = np.roll(np.eye(NUM_CLIPS, 2 * NUM_CLIPS, dtype=np.float32), turn, axis=1)[:, None]
    tensors = {"audio": audio, "text": text, OFFSETS: np.arange(0, 2 * NUM_CLIPS + 1, 2)}
    encoder = Encoder(model=name, weights_sha256=name, preprocessing={})
    header = FeatureHeader(
        shard=index.shard_name,
        shard_sha256=index.sha256,
        num_rows=NUM_CLIPS,
        dtype="fp32",
        encoders={"audio": encoder, "text": encoder},
        missing={},
        content_sha256=content_sha256(sorted(tensors.items())),
    )
    save_file(tensors, folder / f"00000.{name}.safetensors", header.to_metadata())


@pytest.fixture
def folder(tmp_path):
    write_shards(
        tmp_path / "set", [[make_sample(number, labels=[f"class {number % 2}"]) for number in range(NUM_CLIPS)]]
    )
    for name, turn in (("right", 0), ("wrong", 1)):
        write_features(tmp_path / "set", name, turn)
    lines = [{"captions": [[f"clip-{n:04d}", 0]], "clips": [f"clip-{n:04d}", "clip-0000"]} for n in range(NUM_CLIPS)]
    (tmp_path / "relevance.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def test_mass_and_precision_of_known_teachers(folder):
    said = read_said(load_shards(str(folder / "set")), ["right", "wrong"], None, max_clips=100)
    batches = Batches(size=NUM_CLIPS, num_draws=500)
    own = np.zeros((NUM_CLIPS, 2 * NUM_CLIPS), bool)
    own[np.arange(NUM_CLIPS), 2 * np.arange(NUM_CLIPS)] = True
    e = np.exp(1.0)
    right, wrong, both = (judge(said, names, own, 1.0, batches) for names in (["right"], ["wrong"], ["right", "wrong"]))
    assert right.average_precision == 1
    assert wrong.average_precision < both.average_precision < 1
    assert right.average_precision_unannotated is None
    # Each clip comes as often with caption 0, which its teacher knows, as with caption 1, which is like nothing.
    assert right.mass_annotated == pytest.approx((e / (e + 5) + 1 / 6) / 2, abs=0.006)
    assert wrong.mass_annotated == pytest.approx((1 / (e + 5) + 1 / 6) / 2, abs=0.006)
    assert right.mass_true == pytest.approx(e / (e + 5) / 2, abs=0.006)
    assert judge(said, ["right"], None, 1.0, batches).mass_true is None


def test_the_mass_on_other_true_captions_counts_every_caption_not_the_first(folder):
    said = read_said(load_shards(str(folder / "set")), ["right"], None, max_clips=100)
    second_captions = annotated(said)
    second_captions[:, 1::2] = True
    found = chance(said, second_captions, Batches(size=4, num_draws=500))
    assert found.mass_annotated == 1 / 4
    assert found.mass_true == pytest.approx(1 / 4 + 3 / 4 / 2, abs=0.02)


def test_precision_without_the_pairs_that_were_written(folder):
    said = read_said(load_shards(str(folder / "set")), ["right", "wrong"], None, max_clips=100)
    true_KC = (said.cosines(["right"]) > 0.5) | (said.cosines(["wrong"]) > 0.5)
    right, wrong = (judge(said, [name], true_KC, 1.0, Batches(size=3)) for name in ("right", "wrong"))
    others = 2 * NUM_CLIPS**2 - 2 * NUM_CLIPS
    # Six of the twelve true pairs are the clips' own; of the other six one teacher knows nothing, one everything.
    assert right.average_precision == pytest.approx(wrong.average_precision)
    assert wrong.average_precision_unannotated == 1
    assert right.average_precision_unannotated < 2 * NUM_CLIPS / others
    by_chance = chance(said, true_KC, Batches(size=3))
    assert by_chance.average_precision == 2 * NUM_CLIPS / (2 * NUM_CLIPS**2)
    assert by_chance.average_precision_unannotated == NUM_CLIPS / others


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12).filter(any), st.integers(1, 8), st.integers(0, 9))
def test_batches_hold_clips_once_with_captions_of_their_own(num_captions, size, seed):
    clip_C = np.repeat(np.arange(len(num_captions)), num_captions)
    said = Said(keys=[], labels=[], captions=[], clip_C=clip_C, number_C=clip_C, audio={}, text={})
    captioned = np.count_nonzero(num_captions)
    whole = min(size, captioned)
    drawn = list(Batches(size=size, num_draws=3, seed=seed).draw(said))
    assert [len(clips) for clips, _ in drawn] == [whole] * (3 * (captioned // whole))
    assert all((clip_C[captions] == clips).all() for clips, captions in drawn)
    for one in range(3):
        clips = np.concatenate([clips for clips, _ in drawn[one * (captioned // whole) :][: captioned // whole]])
        assert len(set(clips.tolist())) == len(clips)


def test_truth_names_clips_and_captions_by_their_keys(folder):
    said = read_said(load_shards(str(folder / "set")), ["right"], None, max_clips=4)
    lines = [{"captions": [("clip-0001", 1), ("clip-0005", 0)], "clips": ["clip-0000", "clip-0003", "clip-0004"]}]
    assert np.argwhere(truth(said, lines)).tolist() == [[0, 3], [3, 3]]


def test_captions_of_one_label_describe_each_other_s_clips(folder):
    said = read_said(load_shards(str(folder / "set")), ["right"], None, max_clips=3)
    expected = [[1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 1, 1]]
    assert truth_of_labels(said).astype(int).tolist() == expected


def test_the_command_writes_a_table_and_a_picture(folder, monkeypatch, capsys):
    words = [f"shards={folder / 'set'}", "features=[right,wrong]", f"out={folder / 'out'}", "num_queries=2"]
    monkeypatch.setattr(sys, "argv", ["correspondences.py", *words, f"relevance={folder / 'relevance.jsonl'}"])
    correspondences.main()
    assert "all together" in capsys.readouterr().out
    found = json.loads((folder / "out" / "correspondences.json").read_text())
    assert (found["num_clips"], found["num_captions"]) == (NUM_CLIPS, 2 * NUM_CLIPS)
    by_chance = found["teachers"]["by chance"]
    assert by_chance["average_precision"] == pytest.approx((2 * NUM_CLIPS - 1) / (2 * NUM_CLIPS**2))
    assert by_chance["average_precision_unannotated"] == (NUM_CLIPS - 1) / (2 * NUM_CLIPS * (NUM_CLIPS - 1))
    assert found["teachers"]["right"]["average_precision"] > found["teachers"]["wrong"]["average_precision"]
    assert (folder / "out" / "correspondences.png").read_bytes().startswith(b"\x89PNG")


def look(folder, monkeypatch, *words):
    given = [f"shards={folder / 'set'}", f"out={folder / 'out'}", f"relevance={folder / 'relevance.jsonl'}"]
    monkeypatch.setattr(sys, "argv", ["correspondences.py", *given, *words])
    correspondences.main()
    return json.loads((folder / "out" / "correspondences.json").read_text())["pairs"]


def test_pairs_are_chosen_by_name_and_told_one_by_one(folder, monkeypatch):
    words = ["features=[wrong]", "temperature=1", "batch_size=100", "seed=3", "max_clips=100"]
    by_key, by_text = look(folder, monkeypatch, *words, "queries=['clip-0002:1', sound 4]")
    assert (by_key["clip"], by_key["caption"]) == ("clip-0002", "tone number 2")
    assert (by_text["clip"], by_text["caption"]) == ("clip-0004", "sound 4")
    own, others = by_key["mass_annotated"], [each for each in by_key["most_mass"] if not each["is_annotated"]]
    # Its own caption 1 is like nothing; caption 0 of clip 3 is what the clip sounds like, if it was drawn.
    e = np.exp(1.0)
    assert own == pytest.approx(1 / (5 + e) if others[0]["mass"] > own else 1 / 6)
    assert len(by_key["most_mass"]) == 5
    assert [each["mass"] for each in by_key["most_mass"]] == sorted([each["mass"] for each in by_key["most_mass"]])[
        ::-1
    ]
    assert by_key["mass_true"] == 0
    right = look(folder, monkeypatch, "features=[right]", "temperature=1", "batch_size=3", "queries=['clip-0002:0']")[0]
    assert right["mass_annotated"] == right["mass_true"] == pytest.approx(e / (e + 2))
    best = right["most_mass"][0]
    assert (best["clip"], best["is_annotated"], best["is_true"]) == ("clip-0002", True, True)
    assert len({each["clip"] for each in right["most_mass"]}) == len(right["most_mass"]) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["features=[]"], "no teachers to look at"),
        (["features=[other]"], "has no 'other' features for 1 of 1 shards"),
        (["features=[right]", "relevance=/nowhere"], "no relevance file at /nowhere"),
        (["features=[right]", "queries=[A man speaks: hello]"], r"wrong value for 'queries': put a text .* in quotes"),
        (["features=[right]", "queries=['clip-0001:2']"], "no caption 'clip-0001:2' among these 6 clips"),
        (["features=[right]", "top=0"], "correspondences.top=0 must be above 0"),
    ],
)
def test_wrong_words_are_one_line(folder, monkeypatch, words, message):
    monkeypatch.setattr(sys, "argv", ["x", f"shards={folder / 'set'}", f"out={folder / 'out'}", *words])
    with pytest.raises(UserError, match=message) as raised:
        correspondences.main()
    assert "\n" not in str(raised.value)
