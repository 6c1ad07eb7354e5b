"""A vision transformer's blocks, whose parameters bear timm's names as in PaSST and ATST-Frame."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

VIT_EPS = 1e-6


def vit_blocks(depth: int, width: int, num_heads: int, *, qkv_bias: bool) -> nn.ModuleList:
    """Attention and an MLP four times as wide, each after its norm."""
    from timm.models.vision_transformer import Block

    norm = partial(nn.LayerNorm, eps=VIT_EPS)
    return nn.ModuleList(
        Block(width, num_heads, qkv_bias=qkv_bias, norm_layer=norm)  # type: ignore[arg-type]
        for _ in range(depth)
    )


def run_blocks(blocks: nn.ModuleList, tokens_NPC: Tensor, is_seen_NP: Tensor | None = None, *, again: bool) -> Tensor:
    """The tokens after all blocks.

    Args:
        is_seen_NP: bool, the tokens that others attend to; None: all.
        again: compute the activations once more in the backward, in place of keeping them.
    """
    mask = None if is_seen_NP is None else is_seen_NP[:, None, None, :]  # of all heads and queries
    for block in blocks:
        if again and tokens_NPC.requires_grad:
            tokens_NPC = checkpoint(block, tokens_NPC, mask, use_reentrant=False)
        else:
            tokens_NPC = block(tokens_NPC, mask)
    return tokens_NPC


def init_linear(module: nn.Module) -> None:
    """A vision transformer's start, for ``Module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
