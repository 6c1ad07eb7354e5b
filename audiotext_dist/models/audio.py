"""The audio tower: CLIP's own vision transformer, made to read FBANK (VIP-ANT, Zhao et al. 2022).

    waveform -> FBANK [N, 1, time, mel] -> overlapping patches -> CLIP's transformer -> embedding

Two parts change, and both start from the image weights: the patch convolution (three channels to one, a
finer stride) and the grid of positional embeddings (7x7 to 61x5 for ViT-B/32).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from audiotext_dist.errors import UserError
from audiotext_dist.models.clip import create_clip
from audiotext_dist.models.frontends import Fbank, FbankConfig


@dataclass(frozen=True, kw_only=True)
class AudioTowerConfig:
    """A CLIP vision transformer over FBANK.

    name: open_clip model. pretrained: its tag or a local weights file; null is random. init: a run
    folder or export whose own tower of this kind is loaded over that. init_from_image: copy
    the model's image tower instead of reading ``name`` and ``pretrained``. stride_frames, stride_bins: of
    the patches, in FBANK frames and mel bins; the patch itself has the size of the CLIP model's.
    """

    name: str = "ViT-B-32"
    pretrained: str | None = None
    init: str | None = None
    init_from_image: bool = False
    stride_frames: int = 16
    stride_bins: int = 24
    fbank: FbankConfig = field(default_factory=FbankConfig)


class ChannelMeanConv(nn.Module):
    """A three-channel patch convolution read on one channel.

    The three-channel weights stay the parameter, so image checkpoints fit and each channel keeps its own
    gradient; the input meets their channel mean.
    """

    def __init__(self, conv: nn.Conv2d, stride: tuple[int, int]) -> None:
        super().__init__()
        assert conv.bias is None
        self.weight = conv.weight
        self.stride = stride

    def forward(self, fbank_N1TF: Tensor) -> Tensor:
        """[N, 1, time, mel] -> [N, width, grid time, grid mel]."""
        return nn.functional.conv2d(fbank_N1TF, self.weight.mean(dim=1, keepdim=True), stride=self.stride)


class AudioTower(nn.Module):
    """Waveforms to embeddings, not normalised."""

    def __init__(self, config: AudioTowerConfig, sample_rate_hz: int, visual: nn.Module) -> None:
        """``visual``: an open_clip image tower to start from; it is copied."""
        super().__init__()
        self.fbank = Fbank(config.fbank, sample_rate_hz)
        self.transformer = audio_transformer_from(visual, config)
        self.embed_dim: int = self.transformer.output_dim

    def forward(
        self, waveform_NS: Tensor, num_valid_samples_N: Tensor, mask_uniforms_N4: Tensor | None = None
    ) -> Tensor:
        """As ``Fbank.forward``; returns [N, embed_dim]."""
        embedding_ND: Tensor = self.transformer(self.fbank(waveform_NS, num_valid_samples_N, mask_uniforms_N4))
        return embedding_ND


def create_audio_tower(config: AudioTowerConfig, sample_rate_hz: int) -> AudioTower:
    """An audio tower from the open_clip model that ``config`` names.

    Raises:
        UserError: see ``create_clip`` and ``audio_transformer_from``.
    """
    visual = create_clip(config.name, config.pretrained).visual
    assert isinstance(visual, nn.Module)
    return AudioTower(config, sample_rate_hz, visual)


def audio_transformer_from(visual: nn.Module, config: AudioTowerConfig) -> VisionTransformer:
    """A trainable copy of an open_clip vision transformer that reads [N, 1, time, mel].

    Raises:
        UserError: the tower is no plain vision transformer, or its patch is larger than the FBANK.
    """
    if not isinstance(visual, VisionTransformer):
        raise UserError(
            f"the audio tower needs a CLIP vision transformer, not a {type(visual).__name__}: "
            "choose a model such as ViT-B-32"
        )
    num_frames, num_bins = config.fbank.num_fbank_frames, config.fbank.num_mel_bins
    patch_frames, patch_bins = visual.patch_size
    if patch_frames > num_frames or patch_bins > num_bins:
        raise UserError(
            f"a patch of {patch_frames}x{patch_bins} does not fit an FBANK of {num_frames}x{num_bins}: "
            "raise fbank.num_fbank_frames or fbank.num_mel_bins, or choose a model with smaller patches"
        )
    if config.stride_frames < 1 or config.stride_bins < 1:
        raise UserError(f"patch stride {config.stride_frames}x{config.stride_bins}: give values above 0")
    grid = (
        (num_frames - patch_frames) // config.stride_frames + 1,
        (num_bins - patch_bins) // config.stride_bins + 1,
    )
    transformer = copy.deepcopy(visual).train().requires_grad_(True)
    positional_embedding = resize_position_grid(transformer.positional_embedding.detach(), visual.grid_size, grid)
    transformer.positional_embedding = nn.Parameter(positional_embedding)
    transformer.conv1 = ChannelMeanConv(transformer.conv1, (config.stride_frames, config.stride_bins))
    transformer.image_size, transformer.grid_size = (num_frames, num_bins), grid
    return transformer


def resize_position_grid(positional_embedding: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Bilinear resize of a positional grid, without aligned corners; the CLS row is kept.

    Args:
        positional_embedding: [1 + old height * old width, C], CLS first, rows of the grid after it.
        old_grid: (height, width).
        new_grid: (height, width).

    Returns:
        [1 + new height * new width, C].
    """
    assert positional_embedding.shape[0] == 1 + math.prod(old_grid)
    cls_1C, grid_PC = positional_embedding[:1], positional_embedding[1:]
    grid_1CHW = grid_PC.T.reshape(1, -1, *old_grid)
    grid_1CHW = nn.functional.interpolate(grid_1CHW, new_grid, mode="bilinear", align_corners=False)
    return torch.cat([cls_1C, grid_1CHW.flatten(2)[0].T])
