from __future__ import annotations

import huggingface_hub
import pytest
import torch

from audiotext_dist.errors import UserError
from audiotext_dist.models.image import ImageTower, ImageTowerConfig
from audiotext_dist.models.text import TextTower, TextTowerConfig


def test_captions_are_padded_and_cut_to_the_models_context() -> None:
    tower = TextTower(TextTowerConfig(name="tiny-64"))
    tokens_NC = tower.tokenize(["a dog barks", "rain " * 100])
    assert tokens_NC.shape == (2, 32)
    assert tokens_NC.dtype == torch.int64
    assert tokens_NC[0].tolist() == [49406, 320, 1929, 1040, 662, 49407] + [0] * 26
    assert tokens_NC[1, -1] == 49407
    assert tower(tokens_NC).shape == (2, 128)


def test_a_caption_does_not_depend_on_its_neighbours() -> None:
    tower = TextTower(TextTowerConfig(name="tiny-64"))
    together = tower(tower.tokenize(["a dog barks", "heavy rain falls on a tin roof"]))
    torch.testing.assert_close(together[:1], tower(tower.tokenize(["a dog barks"])), atol=1e-5, rtol=1e-4)


def test_frames_of_any_shape_become_embeddings() -> None:
    tower = ImageTower(ImageTowerConfig(name="tiny-64"))
    for height, width in ((64, 64), (90, 120)):
        frames_NHWC = torch.randint(0, 256, (3, height, width, 3), dtype=torch.uint8)
        assert tower(frames_NHWC).shape == (3, 128)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_tower_stays_in_evaluation_mode_without_gradient(frozen: bool) -> None:
    image = ImageTower(ImageTowerConfig(name="tiny-64", frozen=frozen))
    text = TextTower(TextTowerConfig(name="tiny-64", frozen=frozen))
    assert image.training is text.training is not frozen
    image_ND = image.train()(torch.zeros(1, 64, 64, 3, dtype=torch.uint8))
    text_ND = text.train()(text.tokenize(["rain"]))
    for tower, embedding_ND in ((image, image_ND), (text, text_ND)):
        assert all(module.training is not frozen for module in tower.modules())
        assert all(parameter.requires_grad is not frozen for parameter in tower.parameters())
        assert embedding_ND.requires_grad is not frozen


def test_pictures_prepared_unlike_clips_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import audiotext_dist.models.image as image_room

    def squashing(name: str, pretrained: str | None) -> torch.nn.Module:
        model = create(name, pretrained)
        model.visual.preprocess_cfg["resize_mode"] = "squash"
        return model

    create = image_room.create_clip
    monkeypatch.setattr(image_room, "create_clip", squashing)
    with pytest.raises(UserError, match="tiny-64 wants squash bicubic pictures"):
        ImageTower(ImageTowerConfig(name="tiny-64"))


def test_a_text_model_without_network_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="roberta-ViT-B-32") as raised:
        TextTower(TextTowerConfig(name="roberta-ViT-B-32"))
    assert "\n" not in str(raised.value)
