"""Every kind of tower goes through a run: trained, saved, exported, loaded; the same embeddings in the end."""

from __future__ import annotations

import pytest
import torch

from audiotext_dist.data.encoders import encoder_of
from audiotext_dist.distributed import World
from audiotext_dist.errors import UserError
from audiotext_dist.models.dual_encoder import build_model
from audiotext_dist.training.prepare import prepare
from audiotext_dist.training.recipe import read_recipe, read_run_recipe
from audiotext_dist.training.weights import load_model, read_weights
from tests.clips import SAMPLE_RATE_HZ
from tests.models.formula import sound
from tests.models.hub_models import save_audio_model, save_text_model
from tests.ranks import run_command_on_ranks, run_on_ranks
from tests.training.exported import export_and_load
from tests.training.runs import SMALL, write_training_set

TINY_VIT = "{width: 24, depth: 2, num_heads: 3"
KINDS = {
    "passt": [f"model.audio.passt={TINY_VIT}, patchout_time: 1}}", "model.audio.window_seconds=0.5"],
    "mobilenet": ["model.audio.mobilenet={width_factor: 0.1}", "model.audio.window_seconds=0.5"],
    "atst": [f"model.audio.atst={TINY_VIT}}}"],
    "transformers": ["model.audio.name=AUDIO", "model.audio.pretrained=AUDIO"],
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_training_set(tmp_path_factory.mktemp("shards") / "set")


@pytest.fixture
def words_of(shards, tmp_path):
    audio = save_audio_model(tmp_path / "ast", "ast")
    text = save_text_model(tmp_path / "roberta", "roberta")

    def words(kind: str) -> list[str]:
        own = [word.replace("AUDIO", audio) for word in KINDS[kind]]
        return [
            *SMALL,
            f"run_dir={tmp_path / 'run'}",
            f"data.train.own.shards={shards}",
            f"model.audio.kind={kind}",
            *own,
            "model.text.kind=transformers",
            f"model.text.name={text}",
            f"model.text.pretrained={text}",
            "model.projection_dim=8",
            "training.max_steps=1",
            "training.global_batch_size=6",
            "training.micro_batch_size=3",
        ]

    return words


@pytest.mark.parametrize(
    "kind", ["passt", "transformers", *(pytest.param(kind, marks=pytest.mark.faults) for kind in ("mobilenet", "atst"))]
)
def test_a_run_with_these_towers_is_exported_and_loaded(words_of, kind, tmp_path):
    words = [*words_of(kind), f"engine.activation_checkpointing={str(kind != 'mobilenet').lower()}"]
    prepared = prepare(read_recipe(words), World())
    before = {name: tensor.clone() for name, tensor in prepared.model.state_dict().items()}
    done = run_command_on_ranks("pretrain", words, 1)
    assert done.returncode == 0, done.stderr
    load_model(prepared.model, str(tmp_path / "run"))
    after = prepared.model.state_dict()
    for part in ("audio.projection.weight", "text.projection.weight", "text.encoder.embeddings.word_embeddings.weight"):
        assert not torch.equal(after[part], before[part]), part
    assert sum(not torch.equal(after[name], before[name]) for name in after if name.startswith("audio.")) > 20

    run_on_ranks(export_and_load, 1, tmp_path / "run", tmp_path / "export")
    recipe = read_run_recipe(tmp_path / "export")
    loaded = build_model(recipe.model.without_weights(), recipe.task, recipe.data.sample_rate_hz)
    load_model(loaded, str(tmp_path / "export"))
    clips_NS, lengths_N = sound(1.0, SAMPLE_RATE_HZ), torch.tensor([SAMPLE_RATE_HZ, 9000])
    with torch.no_grad():
        for model in (prepared.model.eval(), loaded.eval()):
            assert model.embed_audio(clips_NS, lengths_N).shape == (2, 8)
        torch.testing.assert_close(
            loaded.embed_audio(clips_NS, lengths_N), prepared.model.embed_audio(clips_NS, lengths_N)
        )
        tokens_NC = loaded.text.tokenize(["A dog barks!", "rain"])
        torch.testing.assert_close(loaded.embed_text(tokens_NC), prepared.model.embed_text(tokens_NC))
    for modality in ("audio", "text"):
        one, other = (encoder_of(model, recipe.model, recipe.data, modality) for model in (loaded, prepared.model))
        assert one == other
    assert read_weights(str(tmp_path / "export")).keys() == after.keys()


def test_a_frozen_audio_tower_says_the_same_always_and_its_projection_learns(words_of):
    recipe = read_recipe([*words_of("passt"), "model.audio.frozen=true"])
    model = build_model(recipe.model, recipe.task, SAMPLE_RATE_HZ).train()
    clips_NS, lengths_N, uniforms_N4 = sound(1.0, SAMPLE_RATE_HZ), torch.tensor([SAMPLE_RATE_HZ] * 2), torch.rand(2, 4)
    embedding_ND = model.embed_audio(clips_NS, lengths_N, uniforms_N4)
    assert torch.equal(embedding_ND, model.embed_audio(clips_NS, lengths_N))
    embedding_ND[:, 0].sum().backward()
    learning = {name for name, parameter in model.audio.named_parameters() if parameter.grad is not None}
    assert learning == {"projection.weight", "projection.bias"}
    asked = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "audio." in name}
    assert asked == {"audio.projection.weight", "audio.projection.bias"}
    assert not any(module.training for module in model.audio.modules())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["model.audio.window_seconds=null", "data.clip_seconds=30"],
            r"clip_seconds=30 is more than the 10.1 s .*window",
        ),
        (["model.audio.window_seconds=11"], r"window_seconds=11 is more than the 10.1 s"),
        (["model.audio.window_hop_seconds=0.6"], r"window_hop_seconds=0.6 is more than model.audio.window_seconds=0.5"),
        (["model.audio.passt.patchout_time=3"], r"patchout_time=3 leaves nothing of the 3 columns of 0.5 s"),
        (["model.audio.init_from_image=true"], r"kind=passt has no init_from_image"),
        (
            ["model.text.frozen=true", "data.caption_features=clip"],
            r"data.caption_features=clip .*model.projection_dim=null",
        ),
        (["model.audio.kind=clip", "model.audio.sha256=00"], r"sha256 says nothing to kind=clip"),
        (["model.projection_dim=0"], r"model.projection_dim=0"),
    ],
)
def test_impossible_combinations_are_refused_before_anything_is_loaded(words_of, changes, message):
    with pytest.raises(UserError, match=message):
        read_recipe([*words_of("passt"), *changes])


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("mobilenet", [], None),
        ("mobilenet", ["model.text.frozen=true"], r"activation_checkpointing=true .* what is trained \(audio tower\)"),
        ("passt", ["model.audio.frozen=true", "model.text.frozen=true"], r"what is trained \(no tower\): leave it out"),
    ],
)
def test_a_trained_tower_that_keeps_its_activations_all_the_same_is_named(words_of, kind, changes, message, caplog):
    recipe = read_recipe([*words_of(kind), *changes, "engine.activation_checkpointing=true"])
    if message is not None:
        with pytest.raises(UserError, match=message):
            prepare(recipe, World())
        return
    model = prepare(recipe, World()).model
    assert "activation_checkpointing=true has no effect on the audio tower" in caplog.text
    assert model.text.grad_checkpointing
