"""Audio towers of the transformers library, against its own feature extractors and models, one clip at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import ASTModel, AutoFeatureExtractor, AutoModel, ClapAudioModelWithProjection

from audiotext_dist.errors import UserError
from audiotext_dist.models.audio import AudioTowerConfig
from audiotext_dist.models.hub_audio import HubAudioTower
from audiotext_dist.models.towers import build_audio_tower
from tests.models.formula import sound
from tests.models.hub_models import save_audio_model, save_text_model

KINDS = ["ast", "clap", "clap-fused", "wav2vec2", "wav2vec2-masked"]


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_audio_model(tmp_path_factory.mktemp("hub") / request.param, request.param)


def reference(folder: str, clip_S: Tensor) -> Tensor:
    """What the library says of one clip without padding."""
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    heard = extractor(clip_S.numpy(), sampling_rate=16000, return_tensors="pt")
    if "ast" in Path(folder).name:
        return ASTModel.from_pretrained(folder).eval()(**heard).pooler_output[0]
    if "clap" in Path(folder).name:
        heard["input_features"] = heard["input_features"].float()
        heard["is_longer"] = torch.zeros(1, 1, dtype=torch.bool)  # its extractor calls one of a batch longer
        return ClapAudioModelWithProjection.from_pretrained(folder).eval()(**heard).audio_embeds[0]
    return AutoModel.from_pretrained(folder).eval()(**heard).last_hidden_state[0].mean(dim=0)


@torch.no_grad()
def test_a_batch_of_padded_clips_is_heard_as_by_the_library(folder: str) -> None:
    tower = HubAudioTower(folder, folder, 16000).eval()
    clips_NS, lengths = sound(1.0, 16000, num_clips=3), [16000, 12345, 3000]
    for clip_S, length in zip(clips_NS, lengths, strict=True):
        clip_S[length:] = 0
    found_ND = tower(clips_NS, torch.tensor(lengths))
    assert found_ND.shape == (3, tower.embed_dim)
    for found_D, clip_S, length in zip(found_ND, clips_NS, lengths, strict=True):
        if Path(folder).name == "wav2vec2" and length < 16000:
            continue  # without a mask its first norm hears the padding too, in the library as well
        torch.testing.assert_close(found_D, reference(folder, clip_S[:length]), atol=1e-4, rtol=1e-4)


def test_every_clip_is_for_itself_in_training_and_every_parameter_learns(folder: str) -> None:
    tower = HubAudioTower(folder, None, 16000).train()
    for module in tower.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    tower.encoder.model.config.attention_dropout = tower.encoder.model.config.hidden_dropout = 0.0
    clips_NS, lengths_N = sound(1.0, 16000), torch.tensor([16000, 16000])
    tower(clips_NS, lengths_N).square().sum().backward()
    silent = [name for name, parameter in tower.named_parameters() if parameter.grad is None]
    # A model's own masking and fusion of longer clips are not used.
    assert all("masked_spec_embed" in name or "fusion" in name or "mel_conv2d" in name for name in silent)
    for module in tower.modules():
        assert not (isinstance(module, torch.nn.BatchNorm2d) and module.training)


def test_activations_can_be_computed_again(folder: str) -> None:
    tower = HubAudioTower(folder, None, 16000)
    assert tower.grad_checkpointing is False
    if "clap" in Path(folder).name:
        with pytest.raises(UserError, match=r"set engine.activation_checkpointing=false"):
            tower.grad_checkpointing = True
        return
    tower.grad_checkpointing = True
    assert tower.grad_checkpointing is True


def test_another_rate_is_resampled_and_a_longer_clip_refused(tmp_path: Path) -> None:
    folder = save_audio_model(tmp_path, "clap")
    tower = build_audio_tower(AudioTowerConfig(kind="transformers", name=folder), 32000)
    assert tower(sound(1.0, 32000), torch.tensor([32000, 20000])).shape == (2, 12)
    with pytest.raises(UserError, match=r"clips of 2 s are longer than the 1 s .*window_seconds=1"):
        tower(sound(2.0, 32000), torch.tensor([64000, 64000]))


def test_a_model_that_is_no_audio_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot load model.audio.name=") as raised:
        HubAudioTower(save_text_model(tmp_path, "bert"), None, 16000)
    assert "\n" not in str(raised.value)
