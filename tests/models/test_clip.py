from __future__ import annotations

import pickle
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from audiotext_dist.errors import UserError
from audiotext_dist.models.clip import clip_settings, create_clip


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return create_clip("tiny-64", None).state_dict()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_local_weights_are_loaded(tmp_path: Path, weights: dict[str, Tensor], suffix: str) -> None:
    file = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(weights, file)
    else:
        save_file(weights, file)
    loaded = create_clip("tiny-64", str(file)).state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


@pytest.mark.parametrize("name", ["ViT-B/32", "vit-b-32", "ViTB32"])
def test_an_unknown_model_names_those_close_to_it(name: str) -> None:
    with pytest.raises(UserError, match=f"'{name}'.*ViT-B-32"):
        clip_settings(name)


def test_a_captioning_model_is_refused() -> None:
    with pytest.raises(UserError, match="coca_ViT-B-32"):
        clip_settings("coca_ViT-B-32")


def test_an_unknown_tag_lists_the_tags_of_the_model() -> None:
    with pytest.raises(UserError, match=r"'openia'.*laion2b_s34b_b79k"):
        create_clip("ViT-B-32", "openia")
    with pytest.raises(UserError, match=r"tiny-64 has no pretrained tag 'openai'.*local weights file"):
        create_clip("tiny-64", "openai")


def test_weights_of_another_activation_name_the_model_that_fits() -> None:
    with pytest.raises(UserError, match=r"set the name to ViT-B-32-quickgelu$"):
        create_clip("ViT-B-32", "openai")


def test_a_missing_weights_file_is_named() -> None:
    with pytest.raises(UserError, match=r"no weights file at missing.safetensors"):
        create_clip("tiny-64", "missing.safetensors")


@pytest.mark.parametrize("content", [b"these are no weights", b""])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_that_holds_no_weights_is_named(tmp_path: Path, suffix: str, content: bytes) -> None:
    file = tmp_path / f"broken{suffix}"
    file.write_bytes(content)
    assert_names_file(file)


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], {"step": 3}, {"model": {"a": torch.zeros(1)}}])
def test_a_file_of_another_kind_is_named(tmp_path: Path, content: object) -> None:
    file = tmp_path / "other.pt"
    torch.save(content, file)
    assert_names_file(file)


def test_weights_of_another_model_are_refused(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    file = tmp_path / "other.safetensors"
    save_file({name: tensor for name, tensor in weights.items() if not name.startswith("text")}, file)
    assert_names_file(file)


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "ran",)

    file = tmp_path / "attack.pt"
    torch.save({"visual.proj": Attack()}, file, pickle_module=pickle)
    assert_names_file(file)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("name", "pretrained"), [("ViT-B-32", "laion2b_s34b_b79k"), ("roberta-ViT-B-32", None)])
def test_a_download_without_network_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, pretrained: str | None
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=rf"of open_clip model {name} \(.+\): download it once") as raised:
        create_clip(name, pretrained)
    assert "\n" not in str(raised.value)


def assert_names_file(file: Path) -> None:
    with pytest.raises(UserError, match=f"{file}.*tiny-64") as raised:
        create_clip("tiny-64", str(file))
    assert "\n" not in str(raised.value)
