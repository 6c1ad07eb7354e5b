"""What cannot be evaluated is refused before anything is trained."""

import json
import re
import shutil

import pytest

from audiotext_dist.data.sets import DataConfig, SetConfig, open_sets
from audiotext_dist.distributed import World
from audiotext_dist.errors import UserError
from audiotext_dist.evaluation.checks import check_metric, check_sets
from audiotext_dist.evaluation.metrics import METRICS
from audiotext_dist.evaluation.report import flat_metrics
from audiotext_dist.training.prepare import prepare
from audiotext_dist.training.recipe import read_recipe
from tests.clips import SAMPLE_RATE_HZ, make_sample, write_shards
from tests.training.runs import SMALL

NUM_CLIPS = 4


@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path / "set", [[make_sample(number) for number in range(NUM_CLIPS)]])
    return tmp_path


def write_relevance(folder, *, captions=(0, 1), clips=range(9)):
    """Each clip's captions describe it; clips from 4 on are of another set."""
    lines = [{"captions": [[f"clip-{n:04d}", c] for c in captions], "clips": [f"clip-{n:04d}"]} for n in clips]
    (folder / "relevance.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(folder / "relevance.jsonl")


def check(folder, task="audio-text", **chosen):
    sets = {"own": SetConfig(shards=str(folder / "set"), **chosen)}
    data = DataConfig(sample_rate_hz=SAMPLE_RATE_HZ, clip_seconds=1.0)
    check_sets(task, sets, open_sets(sets, data, frames=False, captions=True))


def test_a_set_with_a_relevance_file_of_more_clips_is_fine(folder):
    check(folder, relevance=write_relevance(folder), benchmark="clotho-evaluation")
    check(folder, relevance="labels")
    check(folder, task="audio-image", relevance="labels")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"clips": [0, 1, 3]}, "says of 3 clips and captions of set 'own' nothing .* clip clip-0002 the first"),
        (
            {"captions": [1]},
            "says of 4 clips and captions of set 'own' nothing .* caption 0 of clip clip-0000 the",
        ),
        ({"captions": [0, 1, 2]}, "names caption 2 of clip-0000, which has fewer"),
    ],
)
def test_a_query_without_a_relevant_clip_is_told(folder, given, message):
    with pytest.raises(UserError, match=message) as raised:
        check(folder, relevance=write_relevance(folder, **given))
    assert "\n" not in str(raised.value)


def test_a_wrong_relevance_is_told(folder):
    with pytest.raises(UserError, match="task=audio-image has not"):
        check(folder, task="audio-image", relevance="file.jsonl")
    with pytest.raises(UserError, match="no relevance file at"):
        check(folder, relevance=str(folder / "nowhere.jsonl"))


def test_clips_with_other_numbers_of_captions_or_none_are_told(tmp_path):
    write_shards(tmp_path / "set", [[make_sample(0), make_sample(1, captions=["one"])]])
    with pytest.raises(UserError, match="clip-0001 of set 'own' has 1 captions and clip-0000 has 2"):
        check(tmp_path)
    write_shards(tmp_path / "set", [[make_sample(0)], [make_sample(0, captions=["one"])]])
    with pytest.raises(UserError, match="clip-0000 of set 'own' has 1 captions and clip-0000 has 2"):
        check(tmp_path)
    shutil.rmtree(tmp_path / "set")
    write_shards(tmp_path / "set", [[make_sample(0), make_sample(1, captions=[])]])
    with pytest.raises(UserError, match=r"'own' has 1 clips without a caption to be found by in .*00000.tar"):
        check(tmp_path)


def run(folder, *words):
    given = [f"data.{part}.own.shards={folder / 'set'}" for part in ("train", "validation")]
    given += [f"run_dir={folder / 'run'}", "training.global_batch_size=4", "data.num_lanes=2", *words]
    return prepare(read_recipe([*SMALL, *given]), World())


@pytest.mark.parametrize("relevance", [None, "labels", "file"])
def test_every_metric_of_an_evaluation_can_be_the_best_one_and_no_other(folder, relevance):
    chosen = write_relevance(folder) if relevance == "file" else relevance
    prepared = run(folder, f"data.validation.own.relevance={'null' if chosen is None else chosen}")
    found = flat_metrics(prepared.evaluate()[0])
    assert len(found) == len(METRICS) * (2 if relevance is None else 4)
    for metric in found:
        check_metric(metric, "audio-text", prepared.recipe.data.validation)
    for metric in (f"{next(iter(found))}x", "validation/own/text->audio (other)/R@1", "R@1", ""):
        with pytest.raises(UserError, match=rf"best_metric={re.escape(metric)} is not among the \d+ metrics"):
            check_metric(metric, "audio-text", prepared.recipe.data.validation)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["checkpoint.best_metric=validation/own/text->audio/R1"],
            "best_metric=validation/own/text->audio/R1 is not among the 8 metrics that are evaluated: did you mean "
            "'validation/own/text->audio/R@1'?",
        ),
        (["checkpoint.best_metric=R@1", "data.validation={}"], "but nothing is evaluated: give data.validation.NAME"),
        (
            ["data.validation.own.shards=LARGE", "data.validation.own.benchmark=audiocaps-val"],
            "data set 'own' holds 496 clips and audiocaps-val 495: it is not that, set its benchmark to null",
        ),
        (["data.validation.own.relevance=FILE"], "says of 1 clips and captions of set 'own' nothing"),
    ],
)
def test_a_run_does_not_begin(folder, words, message):
    if "LARGE" in words[0]:
        write_shards(folder / "large", [[make_sample(number, seconds=0.01, num_frames=0) for number in range(496)]])
    file = write_relevance(folder, clips=range(9))
    lines = (folder / "relevance.jsonl").read_text().splitlines()
    lines[2] = lines[2].replace('["clip-0002", 1]', '["clip-0007", 1]')
    (folder / "relevance.jsonl").write_text("\n".join(lines))
    words = [word.replace("LARGE", str(folder / "large")).replace("FILE", file) for word in words]
    with pytest.raises(UserError) as raised:
        run(folder, *words)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
