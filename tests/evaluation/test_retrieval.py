"""Which rows count as found: own pairs, labels, and a file of what captions truly describe."""

import json
import tracemalloc
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from audiotext_dist.data.sets import DataConfig, SetConfig
from audiotext_dist.data.shard import load_shards
from audiotext_dist.distributed import World
from audiotext_dist.errors import UserError
from audiotext_dist.evaluation.benchmarks import coverage
from audiotext_dist.evaluation.embedded_clips import EmbeddedClip
from audiotext_dist.evaluation.metrics import METRICS
from audiotext_dist.evaluation.report import table
from audiotext_dist.evaluation.retrieval import evaluate_set
from tests.clips import SAMPLE_RATE_HZ, make_sample, write_shards
from tests.ranks import run_on_ranks

NUM_CLIPS = 12


class Oracle(torch.nn.Module):
    """Embeds a clip's sound by its pitch and a caption by the number in it: both as the clip's own direction."""

    frame_pixels = 0

    def __init__(self, confused=()):
        super().__init__()
        self.text = SimpleNamespace(tokenize=lambda captions: torch.tensor([[int(c.split()[-1])] for c in captions]))
        self.confused = dict(confused)

    def embed_audio(self, waveform_NS, num_valid_samples_N):
        pitches = torch.fft.rfft(waveform_NS.double()).abs().argmax(dim=1)
        return torch.eye(NUM_CLIPS)[(pitches - 200) // 37]

    def embed_text(self, tokens_NC):
        return torch.eye(NUM_CLIPS)[[self.confused.get(int(number), int(number)) for number in tokens_NC[:, 0]]]


@pytest.fixture
def folder(tmp_path):
    samples = [make_sample(number, labels=[f"class {number % 3}"]) for number in range(NUM_CLIPS)]
    write_shards(tmp_path, [samples[:7], samples[7:]])
    return tmp_path


def evaluate(folder, model, relevance=None):
    data = DataConfig(sample_rate_hz=SAMPLE_RATE_HZ, clip_seconds=1.0, num_workers=0)
    chosen = SetConfig(shards=str(folder), relevance=relevance)
    return evaluate_set(
        model,
        "audio-text",
        load_shards(str(folder)),
        data,
        chosen,
        set_name="test",
        batch_size=5,
        world=World(),
    ).directions


def test_own_pairs(folder):
    directions = evaluate(folder, Oracle(confused={4: 5}))
    assert directions["text->audio"].metrics["R@1"] == pytest.approx(11 / 12)
    # Clip 4 finds none of its captions, and clip 5 its own only below the strangers that tie with them.
    assert directions["audio->text"].metrics["R@1"] == pytest.approx(10 / 12)
    assert (directions["text->audio"].num_queries, directions["text->audio"].num_items) == (24, 12)


def test_labels_count_every_clip_of_the_class(folder):
    directions = evaluate(folder, Oracle(confused={4: 7, 2: 3}), relevance="labels")
    # Caption 4 finds clip 7 of its own class; caption 2 finds clip 3 of another.
    assert directions["text->audio (labels)"].metrics["R@1"] == pytest.approx(11 / 12)
    assert directions["text->audio"].metrics["R@1"] == pytest.approx(10 / 12)
    assert directions["text->audio (labels)"].chance["R@1"] == pytest.approx(4 / 12)


def test_a_file_says_which_captions_describe_which_clips(folder, tmp_path):
    own = [{"captions": [[f"clip-{n:04d}", 0], [f"clip-{n:04d}", 1]], "clips": [f"clip-{n:04d}"]} for n in range(12)]
    own[4]["clips"] = ["clip-0004", "clip-0007"]
    file = tmp_path / "relevance.jsonl"
    file.write_text("\n".join(map(json.dumps, own)))
    directions = evaluate(folder, Oracle(confused={4: 7}), relevance=str(file))
    assert directions["text->audio (truth)"].metrics["R@1"] == 1.0
    assert directions["text->audio"].metrics["R@1"] == pytest.approx(11 / 12)
    # Clip 7 is described by four captions, all of which point at it.
    assert directions["audio->text (truth)"].metrics["mAP@10"] == pytest.approx(11 / 12)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no relevance file"),
        ('{"captions": [["clip-0000", 2]], "clips": []}', "names caption 2 of clip-0000, which has fewer"),
        ('{"captions": [["clip-0001", -1]], "clips": []}', "names caption -1 of clip-0001"),
        ('{"captions": [["clip-0000", 0]], "clips": ["clip-0000"]}', "queries have no relevant item"),
    ],
)
def test_a_wrong_relevance_file_is_named(folder, tmp_path, content, message):
    file = tmp_path / "relevance.jsonl"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        evaluate(folder, Oracle(), relevance=str(file))


def test_clips_of_a_relevance_file_that_the_set_lacks_are_told(folder, tmp_path):
    numbers = range(NUM_CLIPS + 3)
    lines = [{"captions": [[f"clip-{n:04d}", c] for c in (0, 1)], "clips": [f"clip-{n:04d}"]} for n in numbers]
    file = tmp_path / "relevance.jsonl"
    data = DataConfig(sample_rate_hz=SAMPLE_RATE_HZ, clip_seconds=1.0, num_workers=0)
    headings = []
    for count in (NUM_CLIPS, NUM_CLIPS + 3):
        file.write_text("\n".join(map(json.dumps, lines[:count])))
        (result,) = evaluate_on_ranks(0, folder, data, SetConfig(shards=str(folder), relevance=str(file)))
        headings.append(table([result]).splitlines()[0])
    assert headings[0] == "test: 12 clips; per cent (chance)"
    assert headings[1] == "test: 12 clips, of 15 that its relevance file names; per cent (chance)"


def test_clips_of_one_class_do_not_hold_the_square_of_their_number(monkeypatch):
    number = 2000
    rows = np.eye(2, dtype=np.float32)[np.zeros(number, int)]
    clips = [EmbeddedClip(f"{n}", ["class"], rows[n : n + 1], rows[n : n + 1]) for n in range(number)]
    monkeypatch.setattr("audiotext_dist.evaluation.retrieval.embed_set", lambda *_, **__: clips)
    # Ranking is tiled, and not what is measured.
    ranked = "audiotext_dist.evaluation.retrieval.metrics_of_queries"
    monkeypatch.setattr(ranked, lambda own, *_: np.zeros((len(own), len(METRICS))))
    tracemalloc.start()
    chosen = SetConfig(shards="none", relevance="labels")
    result = evaluate_set(
        Oracle(), "audio-text", [], DataConfig(), chosen, set_name="test", batch_size=5, world=World()
    )
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result.directions["text->audio (labels)"].chance["R@1"] == pytest.approx(1)
    assert peak_bytes < number**2  # of scores: 4 bytes each


def test_unequal_caption_counts_are_an_error(tmp_path):
    write_shards(tmp_path, [[make_sample(0), make_sample(1, captions=["only 1"])]])
    with pytest.raises(UserError, match="clip-0001 of set 'test' has 1 captions and clip-0000 has 2"):
        evaluate(tmp_path, Oracle())


def test_the_table_tells_how_much_of_a_benchmark_is_there(folder):
    data = DataConfig(sample_rate_hz=SAMPLE_RATE_HZ, clip_seconds=1.0, num_workers=0)
    (result,) = evaluate_on_ranks(0, folder, data, SetConfig(shards=str(folder), benchmark="audiocaps-test"))
    assert (
        table([result]).splitlines()[0]
        == "test: 12 of the 975 clips and 24 of the 4,875 captions of audiocaps-test; per cent (chance)"
    )
    assert asdict(result)["coverage"]["num_official_clips"] == 975
    with pytest.raises(UserError, match=r"holds 1,046 clips and clotho-evaluation 1,045: .* set its benchmark to null"):
        coverage("clotho-evaluation", 1046, 5230, "test")
    with pytest.raises(
        UserError, match=r"1,045 of the 1,045 clips and 5,226 of the 5,225 .* set its benchmark to null"
    ):
        coverage("clotho-evaluation", 1045, 5226, "test")


def evaluate_on_ranks(rank, folder, data, chosen):
    size = dist.get_world_size() if dist.is_initialized() else 1
    model, shards = Oracle(confused={4: 5, 2: 3}), load_shards(str(folder))
    world = World(rank=rank, size=size)
    return [evaluate_set(model, "audio-text", shards, data, chosen, set_name="test", batch_size=5, world=world)]


def test_ranks_that_share_the_queries_get_what_one_gets_alone(folder):
    data = DataConfig(sample_rate_hz=SAMPLE_RATE_HZ, clip_seconds=1.0, num_workers=0)
    chosen = SetConfig(shards=str(folder), relevance="labels")
    alone = evaluate_on_ranks(0, folder, data, chosen)
    assert run_on_ranks(evaluate_on_ranks, 3, folder, data, chosen) == [alone] * 3
