"""The image tower: CLIP's, frozen in every recipe of the papers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from audiotext_dist.errors import UserError
from audiotext_dist.models.clip import clip_settings, create_clip


@dataclass(frozen=True, kw_only=True)
class ImageTowerConfig:
    """CLIP's image encoder.

    name: open_clip model. pretrained: its tag or a local weights file; null is random. init: a run
    folder or export whose own tower of this kind is loaded over that. frozen: no gradient,
    evaluation mode always.
    """

    name: str = "ViT-B-32"
    pretrained: str | None = None
    init: str | None = None
    frozen: bool = True


class ImageTower(nn.Module):
    """Frames to embeddings, not normalised.

    Raises:
        UserError: see ``create_clip``; or a model whose pictures are prepared in another way than CLIP's.
    """

    def __init__(self, config: ImageTowerConfig) -> None:
        super().__init__()
        self.embed_dim: int = clip_settings(config.name)["embed_dim"]
        self.frozen = config.frozen
        visual = create_clip(config.name, config.pretrained).visual
        assert isinstance(visual, nn.Module)
        self.visual = visual
        self.transform = _transform_of(visual, config.name)
        if self.frozen:
            self.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Self:
        """Training mode, unless the tower is frozen."""
        return super().train(mode and not self.frozen)

    def forward(self, frames_NHWC: Tensor) -> Tensor:
        """uint8 RGB [N, H, W, 3] -> [N, embed_dim]."""
        embedding_ND: Tensor = self.visual(self.transform(frames_NHWC))
        return embedding_ND


def _transform_of(visual: nn.Module, name: str) -> ImageTransform:
    settings = visual.preprocess_cfg
    assert isinstance(settings, dict)
    size = settings["size"]
    height, width = (size, size) if isinstance(size, int) else size
    if height != width or settings["resize_mode"] != "shortest" or settings["interpolation"] != "bicubic":
        raise UserError(
            f"image model {name} wants {settings['resize_mode']} {settings['interpolation']} pictures of "
            f"{height}x{width}: choose one with CLIP's square, bicubic, centre-cropped pictures"
        )
    return ImageTransform(height, settings["mean"], settings["std"])


class ImageTransform(nn.Module):
    """CLIP's evaluation transform in batches: shorter side to ``size`` (bicubic), centre crop, normalise."""

    mean_3: Tensor
    std_3: Tensor

    def __init__(self, size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("mean_3", torch.tensor(mean), persistent=False)
        self.register_buffer("std_3", torch.tensor(std), persistent=False)

    def forward(self, frames_NHWC: Tensor) -> Tensor:
        """uint8 RGB [N, H, W, 3] -> float32 [N, 3, size, size]."""
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2.functional import center_crop, resize

        assert frames_NHWC.dtype == torch.uint8, "the resize clamps and rounds only for uint8"
        frames_NCHW = frames_NHWC.permute(0, 3, 1, 2)
        frames_NCHW = resize(frames_NCHW, [self.size], InterpolationMode.BICUBIC, antialias=True)
        pixels_NCHW: Tensor = center_crop(frames_NCHW, [self.size, self.size]).float() / 255.0
        return (pixels_NCHW - self.mean_3[:, None, None]) / self.std_3[:, None, None]
