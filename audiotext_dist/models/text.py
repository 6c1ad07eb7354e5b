"""The text tower: CLIP's, frozen in the temporal-agreement recipes."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import Literal, Self

from torch import Tensor, nn

from audiotext_dist.errors import UserError
from audiotext_dist.models.clip import clip_settings, create_clip
from audiotext_dist.models.hub_text import HubTextConfig


@dataclass(frozen=True, kw_only=True)
class TextTowerConfig:
    """CLIP's text encoder, or one of the transformers library.

    name: open_clip model; of transformers one on the hub (roberta-large) or a local folder, for sizes and tokenizer.
    pretrained: open_clip's tag or a local weights file; of transformers a name or folder as above, mostly the same
    one; null is random. init: a run folder or export whose own tower of this kind is loaded over that. frozen: no
    gradient, evaluation mode always.
    """

    kind: Literal["clip", "transformers"] = "clip"
    name: str = "ViT-B-32"
    pretrained: str | None = None
    init: str | None = None
    frozen: bool = True
    transformers: HubTextConfig = field(default_factory=HubTextConfig)


class TextTower(nn.Module):
    """Captions to embeddings, not normalised.

    Raises:
        UserError: see ``create_clip``; or a tokenizer that cannot be downloaded.
    """

    def __init__(self, config: TextTowerConfig) -> None:
        import open_clip

        super().__init__()
        self.embed_dim: int = clip_settings(config.name)["embed_dim"]
        self.frozen = config.frozen
        try:
            self.tokenizer = open_clip.get_tokenizer(config.name)
        except OSError as error:
            reason = textwrap.shorten(str(error), 200)
            raise UserError(
                f"cannot load the tokenizer of open_clip model {config.name} ({reason}): "
                "download it once where there is a network"
            ) from error
        transformer = create_clip(config.name, config.pretrained).text
        assert isinstance(transformer, nn.Module)
        self.transformer = transformer
        if self.frozen:
            self.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Self:
        """Training mode, unless the tower is frozen."""
        return super().train(mode and not self.frozen)

    def tokenize(self, captions: list[str]) -> Tensor:
        """int64 [N, context length], zeros after the end-of-text token; longer captions are cut."""
        tokens_NC: Tensor = self.tokenizer(captions)
        return tokens_NC

    def forward(self, tokens_NC: Tensor) -> Tensor:
        """[N, context length] -> [N, embed_dim]."""
        embedding_ND: Tensor = self.transformer(tokens_NC)
        return embedding_ND
