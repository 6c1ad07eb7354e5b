"""An encoder's identity: what its own kind of tower reads, and nothing that only another kind would."""

import pytest

from audiotext_dist.data.encoders import teacher_encoders
from audiotext_dist.training.recipe import read_recipe

TEXT = ["model.text.kind=transformers", "model.text.name=roberta-large"]
PASST = ["model.audio.kind=passt", "model.audio.window_seconds=10", *TEXT]


def identity(*words):
    recipe = read_recipe(["name=test", "data.train.own.shards=x", "model.projection_dim=8", *words])
    return teacher_encoders({}, recipe.model, recipe.data)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (PASST, "model.audio.mobilenet.batch_norm=batch"),
        (PASST, "model.audio.fbank.mean=-4"),
        (PASST, "model.audio.stride_bins=8"),
        (PASST, "model.audio.name=ViT-B-16"),
        (["model.audio.kind=clip"], "model.audio.passt.stride=10"),
        (["model.text.kind=clip"], "model.text.transformers.max_tokens=8"),
    ],
)
def test_settings_of_other_kinds_are_no_difference(kind, change):
    assert identity(*kind, change) == identity(*kind)


@pytest.mark.parametrize(
    ("modality", "kind", "change", "told"),
    [
        ("audio", PASST, "model.audio.passt.stride=10", "with passt="),
        ("audio", PASST, "model.audio.window_seconds=5", "with window_seconds=5.0, not 10.0"),
        ("audio", [], "model.audio.fbank.mean=-4", "with fbank="),
        ("audio", [], "model.audio.name=ViT-B-16", "by model ViT-B-16, not ViT-B-32"),
        ("text", TEXT, "model.text.transformers.max_tokens=8", "with transformers="),
        ("text", TEXT, "model.text.name=bert-base-uncased", "by model bert-base-uncased, not roberta-large"),
    ],
)
def test_settings_of_the_own_kind_are_told(modality, kind, change, told):
    assert identity(*kind, change)[modality].difference(identity(*kind)[modality]).startswith(told)


@pytest.mark.parametrize("kind", ["passt", "mobilenet", "atst"])
def test_a_kind_that_reads_no_name_is_its_own(kind):
    assert identity(f"model.audio.kind={kind}", "data.clip_seconds=5")["audio"].model == kind
    assert identity(*PASST)["text"].model == "roberta-large"
