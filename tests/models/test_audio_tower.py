from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from torch import nn

from audiotext_dist.errors import UserError
from audiotext_dist.models.audio import (
    AudioTower,
    AudioTowerConfig,
    audio_transformer_from,
    create_audio_tower,
    resize_position_grid,
)
from audiotext_dist.models.frontends import FbankConfig


def bilinear(grid: np.ndarray, new_size: int, axis: int) -> np.ndarray:
    """Half-pixel bilinear resize along one axis, edges repeated."""
    old_size = grid.shape[axis]
    centres = (np.arange(new_size) + 0.5) * old_size / new_size - 0.5
    low = np.floor(centres).astype(int)
    share = (centres - low).reshape([-1 if index == axis else 1 for index in range(grid.ndim)])
    before, after = (grid.take(np.clip(low + step, 0, old_size - 1), axis) for step in (0, 1))
    return before * (1 - share) + after * share


def test_vit_b_32_reads_ten_seconds_as_305_patches(vit_b_32: VisionTransformer) -> None:
    tower = AudioTower(AudioTowerConfig(), 16000, vit_b_32).eval()
    patches = tower.transformer.conv1(torch.zeros(1, 1, 1000, 128))
    assert patches.shape == (1, 768, 61, 5)
    assert tower.transformer.positional_embedding.shape == (305 + 1, 768)
    waveform_NS = torch.randint(-9999, 9999, (1, 160_000), dtype=torch.int16)
    with torch.no_grad():
        assert tower(waveform_NS, torch.tensor([160_000])).shape == (1, 512)
    assert tower.embed_dim == 512


def test_positional_grid_of_vit_b_32(vit_b_32: VisionTransformer) -> None:
    transformer = audio_transformer_from(vit_b_32, AudioTowerConfig())
    image_rows = vit_b_32.positional_embedding.detach().double().numpy()
    audio_rows = transformer.positional_embedding.detach().numpy()
    grid = image_rows[1:].reshape(7, 7, 768)
    expected = bilinear(bilinear(grid, 61, axis=0), 5, axis=1)
    np.testing.assert_array_equal(audio_rows[0], image_rows[0])
    np.testing.assert_allclose(audio_rows[1:].reshape(61, 5, 768), expected, atol=1e-6)


@settings(deadline=None)
@given(old=st.tuples(*[st.integers(1, 8)] * 2), new=st.tuples(*[st.integers(1, 20)] * 2))
def test_resize_keeps_cls_and_planes(old: tuple[int, int], new: tuple[int, int]) -> None:
    rows = torch.randn(1 + old[0] * old[1], 3, dtype=torch.float64)
    resized = resize_position_grid(rows, old, new)
    assert resized.shape == (1 + new[0] * new[1], 3)
    assert torch.equal(resized[0], rows[0])
    expected = bilinear(bilinear(rows[1:].reshape(*old, 3).numpy(), new[0], axis=0), new[1], axis=1)
    np.testing.assert_allclose(resized[1:].reshape(*new, 3).numpy(), expected, atol=1e-12)
    assert torch.equal(resize_position_grid(rows, old, old), rows)


def test_patch_convolution_is_the_image_one_on_grey_pictures(vit_b_32: VisionTransformer) -> None:
    transformer = audio_transformer_from(vit_b_32, AudioTowerConfig(stride_frames=32, stride_bins=32))
    grey = torch.randn(2, 1, 96, 64)
    expected = vit_b_32.conv1(grey.expand(-1, 3, -1, -1)) / 3
    torch.testing.assert_close(transformer.conv1(grey), expected, atol=1e-5, rtol=1e-4)
    assert transformer.conv1.weight.shape == (768, 3, 32, 32)


def test_a_tower_is_a_trainable_copy() -> None:
    visual = VisionTransformer(64, 16, width=32, layers=1, heads=1, mlp_ratio=1.0, output_dim=8)
    visual.eval().requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in visual.state_dict().items()}
    transformer = audio_transformer_from(visual, AudioTowerConfig())
    assert all(module.training for module in transformer.modules())
    transformer(torch.randn(2, 1, 1000, 128)).sum().backward()
    for name, parameter in transformer.named_parameters():
        assert parameter.grad is not None, name
        with torch.no_grad():
            parameter.add_(1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in visual.state_dict().items())


@pytest.mark.parametrize("other", [nn.Linear(2, 2), ModifiedResNet((1, 1, 1, 1), 8, 2, width=8)])
def test_a_tower_that_is_no_vision_transformer_is_named(other: nn.Module) -> None:
    with pytest.raises(UserError, match=type(other).__name__):
        audio_transformer_from(other, AudioTowerConfig())


def test_a_patch_larger_than_the_fbank_is_refused() -> None:
    config = AudioTowerConfig(name="tiny-audio-32", fbank=FbankConfig(num_fbank_frames=31, time_mask_frames=0))
    with pytest.raises(UserError, match="32x32 does not fit an FBANK of 31x128"):
        create_audio_tower(config, 16000)


def test_a_stride_of_zero_is_refused() -> None:
    with pytest.raises(UserError, match="stride 0x24"):
        create_audio_tower(AudioTowerConfig(name="tiny-audio-32", stride_frames=0), 16000)
