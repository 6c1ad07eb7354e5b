from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from audiotext_dist.configuration import parse
from audiotext_dist.errors import UserError
from audiotext_dist.models.audio import AudioTowerConfig
from audiotext_dist.models.dual_encoder import ModelConfig, ModelInputs, Task, build_model
from audiotext_dist.models.frontends import FbankConfig
from audiotext_dist.models.image import ImageTowerConfig
from audiotext_dist.models.text import TextTowerConfig

SAMPLE_RATE_HZ = 16000
TINY = ModelConfig(
    audio=AudioTowerConfig(
        name="tiny-audio-32",
        stride_frames=32,
        stride_bins=32,
        fbank=FbankConfig(num_fbank_frames=100, time_mask_frames=20),
    ),
    image=ImageTowerConfig(name="tiny-64"),
    text=TextTowerConfig(name="tiny-64"),
)


def make_inputs(num_rows: int = 3) -> ModelInputs:
    generator = torch.Generator().manual_seed(0)
    tokens_NC = torch.zeros(num_rows, 32, dtype=torch.int64)
    tokens_NC[:, 1] = torch.randint(1, 40_000, (num_rows,), generator=generator)
    tokens_NC[:, 2] = 49407
    return ModelInputs(
        waveform_NS=torch.randint(-9999, 9999, (num_rows, 16000), generator=generator, dtype=torch.int16),
        num_valid_samples_N=torch.full((num_rows,), 16000),
        mask_uniforms_N4=torch.rand(num_rows, 4, generator=generator),
        frames_NHWC=torch.randint(0, 256, (num_rows, 64, 64, 3), generator=generator, dtype=torch.uint8),
        tokens_NC=tokens_NC,
    )


@pytest.mark.parametrize("task", get_args(Task))
def test_a_task_gives_its_two_sides_in_order_and_of_unit_length(task: Task) -> None:
    model = build_model(TINY, task, SAMPLE_RATE_HZ).eval()
    inputs = make_inputs()
    sides = {
        "audio": lambda: model.embed_audio(inputs.waveform_NS, inputs.num_valid_samples_N, inputs.mask_uniforms_N4),
        "image": lambda: model.embed_images(inputs.frames_NHWC),
        "text": lambda: model.embed_text(inputs.tokens_NC),
    }
    for modality, found_ND in zip(task.split("-"), model(inputs), strict=True):
        assert found_ND.shape == (3, 128)
        assert found_ND.dtype == torch.float32
        torch.testing.assert_close(found_ND.norm(dim=1), torch.ones(3))
        torch.testing.assert_close(found_ND, sides[modality]())


@pytest.mark.parametrize("task", ["audio-image", "audio-text"])
def test_a_frozen_tower_never_changes(task: Task) -> None:
    model = build_model(TINY, task, SAMPLE_RATE_HZ).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    first_ND, second_ND = model(make_inputs())
    (model.scale() * first_ND @ second_ND.T).log_softmax(dim=1).trace().neg().backward()
    optimizer.step()
    for name, tensor in model.state_dict().items():
        is_frozen = name.startswith(("image.", "text."))
        assert torch.equal(tensor, before[name]) is is_frozen, name


def test_autocast_reaches_the_towers_and_not_the_embeddings() -> None:
    torch.manual_seed(0)
    model = build_model(TINY, "audio-image", SAMPLE_RATE_HZ).eval()
    inputs = make_inputs()
    expected = model(inputs)
    computed_in: set[torch.dtype] = set()

    def record(_module: object, _inputs: object, output: Tensor) -> None:
        computed_in.add(output.dtype)

    for tower in (model.audio, model.image):
        assert tower is not None
        tower.register_forward_hook(record)
    model.autocast_dtype = torch.bfloat16
    for found_ND, expected_ND in zip(model(inputs), expected, strict=True):
        assert found_ND.dtype == torch.float32
        torch.testing.assert_close(found_ND, expected_ND, atol=0.02, rtol=0)
    assert computed_in == {torch.bfloat16}


def test_logit_scale_starts_at_the_temperature_and_is_bounded_with_a_live_gradient() -> None:
    model = build_model(TINY, "image-text", SAMPLE_RATE_HZ)
    assert model.logit_scale.shape == (1,)
    torch.testing.assert_close(model.scale(), torch.tensor([1 / 0.07]))
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    scale = model.scale()
    torch.testing.assert_close(scale, torch.tensor([100.0]))
    scale.sum().backward()
    torch.testing.assert_close(model.logit_scale.grad, torch.tensor([100.0]))


def test_a_fixed_temperature_is_not_learned() -> None:
    config = replace(TINY, init_temperature=0.05, learn_temperature=False)
    model = build_model(config, "image-text", SAMPLE_RATE_HZ)
    assert not model.scale().requires_grad
    torch.testing.assert_close(model.scale(), torch.tensor([20.0]))


def test_the_audio_tower_can_start_from_the_image_tower() -> None:
    config = replace(TINY, audio=replace(TINY.audio, name="never-read", init_from_image=True))
    model = build_model(config, "audio-image", SAMPLE_RATE_HZ)
    assert model.audio is not None
    assert model.image is not None
    audio, image = model.audio.transformer.state_dict(), model.image.visual.state_dict()
    assert audio.keys() == image.keys()
    for name in audio.keys() - {"positional_embedding"}:
        assert torch.equal(audio[name], image[name]), name
    assert all(parameter.requires_grad for parameter in model.audio.parameters())
    with pytest.raises(UserError, match="task=audio-text has no image tower"):
        build_model(config, "audio-text", SAMPLE_RATE_HZ)


def test_towers_of_different_sizes_are_refused() -> None:
    config = replace(TINY, text=TextTowerConfig(name="ViT-S-32-alt"))
    with pytest.raises(UserError, match="audio tower gives 128 dimensions and the text tower 256"):
        build_model(config, "audio-text", SAMPLE_RATE_HZ)


def test_a_configuration_is_read_from_words() -> None:
    words = ["audio.name=tiny-audio-32", "audio.fbank.mean=-4.5", "image.frozen=false", "text.pretrained=null"]
    config = parse(ModelConfig, words)
    assert config.audio == AudioTowerConfig(name="tiny-audio-32", fbank=FbankConfig(mean=-4.5))
    assert config.image == ImageTowerConfig(frozen=False)
    with pytest.raises(UserError, match="max_logit_scale"):
        parse(ModelConfig, ["init_temperature=0.001"])
