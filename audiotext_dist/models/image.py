"""The image tower: CLIP's, frozen in every recipe of the papers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from audiotext_dist.errors import UserError
from audiotext_dist.models.clip import clip_settings, create_clip
from audiotext_dist.models.frontends import ImageTransform


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
