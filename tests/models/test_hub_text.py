from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import AutoModel

from audiotext_dist.errors import UserError
from audiotext_dist.models.hub_text import HubTextConfig, HubTextTower
from audiotext_dist.models.text import TextTowerConfig
from audiotext_dist.models.towers import build_text_tower
from tests.models.hub_models import save_text_model

CONFIG = HubTextConfig(max_tokens=6)


@pytest.fixture(scope="module", params=["bert", "roberta"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_text_model(tmp_path_factory.mktemp("hub") / request.param, request.param)


def tower_of(folder: str, config: HubTextConfig = CONFIG, *, frozen: bool = False) -> HubTextTower:
    return HubTextTower(config, folder, folder, frozen=frozen)


def test_captions_are_cleaned_cut_and_padded(folder: str) -> None:
    tower = tower_of(folder)
    # 4 a, 5 dog, 6 barks; <s> is 0, </s> 2, <pad> 1.
    assert tower.tokenize(["A Dog, barks!", "dog", "dog " * 20]).tolist() == [
        [0, 4, 5, 6, 2, 1],
        [0, 5, 2, 1, 1, 1],
        [0, 5, 5, 5, 5, 2],
    ]
    as_written = tower_of(folder, replace(CONFIG, lower_case=False, strip_punctuation=False))
    assert as_written.tokenize(["Dog!"]).tolist() == [[0, 13, 12, 2]]


@torch.no_grad()
def test_the_first_token_of_the_librarys_own_model(folder: str) -> None:
    tower = tower_of(folder).eval()
    model = AutoModel.from_pretrained(folder).eval()
    for caption in ("a dog barks", "dog"):
        expected = model(tower.tokenize([caption])).last_hidden_state
        # Padded by the longer neighbour.
        found = tower(tower.tokenize([caption, "rain falls on a"]))
        torch.testing.assert_close(found[:1], expected[:, 0], atol=1e-5, rtol=0)
        averaged = tower_of(folder, replace(CONFIG, pooling="mean")).eval()
        torch.testing.assert_close(
            averaged(tower.tokenize([caption, "rain falls on a"]))[:1], expected.mean(dim=1), atol=1e-5, rtol=0
        )


def test_dropout_is_what_the_recipe_says_and_in_training_alone(folder: str) -> None:
    tokens = tower_of(folder).tokenize(["a dog barks"])
    for dropout in (0.0, 0.2):
        tower = tower_of(folder, replace(CONFIG, dropout=dropout)).train()
        first, second = tower(tokens), tower(tokens)
        assert torch.equal(first, second) is (dropout == 0)
        assert torch.equal(tower.eval()(tokens), tower(tokens))
    rates = {module.p for module in tower.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.2}
    assert tower.encoder.config.attention_probs_dropout_prob == 0.2


def test_every_parameter_learns_and_activations_computed_again_change_nothing(folder: str) -> None:
    gradients = []
    for again in (False, True):
        tower = tower_of(folder, replace(CONFIG, dropout=0.0)).train()
        tower.grad_checkpointing = again
        assert tower.grad_checkpointing is again
        tower(tower.tokenize(["a dog barks"])).square().sum().backward()
        gradients.append([parameter.grad for parameter in tower.parameters()])
        assert all(gradient is not None for gradient in gradients[-1])
    torch.testing.assert_close(*gradients)


def test_a_frozen_tower_stays_in_evaluation_mode(folder: str) -> None:
    tower = tower_of(folder, frozen=True).train()
    assert not any(module.training for module in tower.modules())
    assert not any(parameter.requires_grad for parameter in tower.parameters())


def test_random_weights_need_no_weights_file(tmp_path: Path) -> None:
    folder = save_text_model(tmp_path, "roberta", with_weights=False)
    sizes = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**sizes, "dtype": "float16"}))
    config = TextTowerConfig(kind="transformers", name=folder, transformers=CONFIG)
    tower = build_text_tower(config)
    assert isinstance(tower, HubTextTower)
    assert tower(tower.tokenize(["a dog"])).shape == (1, 16)
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.float32}
    with pytest.raises(UserError, match=rf"cannot load model.text.pretrained={folder} .*local folder") as raised:
        build_text_tower(replace(config, pretrained=folder))
    assert "\n" not in str(raised.value)


def test_what_does_not_fit_is_named(folder: str, tmp_path: Path) -> None:
    # RoBERTa's first two positions are those of the padding and before.
    positions = 38 if "roberta" in folder else 40
    longest = tower_of(folder, replace(CONFIG, max_tokens=positions))
    assert longest(longest.tokenize(["dog " * 60])).shape == (1, 16)
    with pytest.raises(UserError, match=rf"max_tokens={positions + 1} is more than the {positions} positions"):
        tower_of(folder, replace(CONFIG, max_tokens=positions + 1))
    with pytest.raises(UserError, match=r"transformers.dropout=1.0 must lie in \[0, 1\)"):
        HubTextConfig(dropout=1.0)
    shorter = AutoModel.from_pretrained(folder)
    shorter.encoder.layer = shorter.encoder.layer[:1]
    shorter.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"model.text.pretrained={tmp_path} lacks 16 weights of the model, encoder"):
        HubTextTower(CONFIG, folder, str(tmp_path), frozen=False)


def test_without_a_network_the_mend_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"model.text.name=roberta-large .*hf download NAME") as raised:
        tower_of("roberta-large")
    assert "\n" not in str(raised.value)
