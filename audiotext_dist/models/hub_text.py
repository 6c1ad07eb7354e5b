"""Text towers of the transformers library: RoBERTa, BERT and what else has an encoder.

    caption -> lower case, no punctuation -> tokens -> encoder -> its first token

Shapes: N captions, C tokens, D embedding.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

import torch
from torch import Tensor, nn

from audiotext_dist.errors import UserError, require_positive
from audiotext_dist.models.hub import compute_activations_again, hub_config, hub_errors, hub_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, kw_only=True)
class HubTextConfig:
    """A text model of the transformers library; the defaults are those of Correspondences (Primus et al. 2024).

    dropout: of hidden states and attention, in training. max_tokens: longer captions are cut. pooling: the first token,
    or the mean of all.
    """

    dropout: float = 0.2
    max_tokens: int = 32
    lower_case: bool = True
    strip_punctuation: bool = True
    pooling: Literal["first", "mean"] = "first"

    def __post_init__(self) -> None:
        require_positive(self, "model.text.transformers", "max_tokens")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.text.transformers.dropout={self.dropout} must lie in [0, 1)")


class HubTextTower(nn.Module):
    """Captions to embeddings, not normalised.

    Raises:
        UserError: model or tokenizer cannot be loaded, or do not fit these settings.
    """

    def __init__(self, config: HubTextConfig, name: str, pretrained: str | None, *, frozen: bool) -> None:
        from transformers import AutoModel, AutoTokenizer

        super().__init__()
        self.config = config
        self.frozen = frozen
        with hub_errors("model.text.name", name):
            self.tokenizer = AutoTokenizer.from_pretrained(name)
        if self.tokenizer.pad_token_id is None:
            raise UserError(f"the tokenizer of model.text.name={name} has no padding: choose an encoder such as BERT")
        sizes = hub_config("model.text.name", name, config.dropout)
        self.encoder = hub_model("model.text.pretrained", AutoModel, sizes, pretrained)
        num_positions = _num_positions(self.encoder, sizes)
        if num_positions is not None and config.max_tokens > num_positions:
            raise UserError(
                f"model.text.transformers.max_tokens={config.max_tokens} is more than the {num_positions} positions of "
                f"{name}: lower it"
            )
        self.embed_dim: int = sizes.hidden_size
        if frozen:
            self.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Self:
        """Training mode, unless the tower is frozen."""
        return super().train(mode and not self.frozen)

    @property
    def grad_checkpointing(self) -> bool:
        """True where the backward computes the activations again."""
        return bool(self.encoder.is_gradient_checkpointing)

    @grad_checkpointing.setter
    def grad_checkpointing(self, again: bool) -> None:
        if again:
            compute_activations_again(self.encoder)

    def tokenize(self, captions: list[str]) -> Tensor:
        """int64 [N, C], C of the longest caption and at most ``max_tokens``; padding after its end."""
        if self.config.lower_case:
            captions = [caption.lower() for caption in captions]
        if self.config.strip_punctuation:
            captions = [caption.translate(_WITHOUT_PUNCTUATION) for caption in captions]
        found = self.tokenizer(
            captions, padding="longest", truncation=True, max_length=self.config.max_tokens, return_tensors="pt"
        )
        tokens_NC: Tensor = found["input_ids"]
        return tokens_NC

    def forward(self, tokens_NC: Tensor) -> Tensor:
        """[N, C] -> [N, embed_dim]."""
        is_token_NC = tokens_NC != self.tokenizer.pad_token_id
        states_NCD: Tensor = self.encoder(tokens_NC, attention_mask=is_token_NC.long()).last_hidden_state
        match self.config.pooling:
            case "first":
                return states_NCD[:, 0]
            case "mean":
                share_NC = is_token_NC / is_token_NC.sum(dim=1, keepdim=True)
                return torch.einsum("ncd,nc->nd", states_NCD, share_NC.to(states_NCD.dtype))


def _num_positions(encoder: nn.Module, sizes: PreTrainedConfig) -> int | None:
    """How many tokens an encoder has positions for, None where any number."""
    num_positions: int | None = getattr(sizes, "max_position_embeddings", None)
    for name, module in encoder.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa and its kin begin after the position of the padding.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return num_positions
