"""More random numbers from the few that belong to a clip.

The loader draws four uniforms for each appearance of a clip in an epoch. What needs more of them (patchout, the
windows of a long clip) takes a hash of those four: whole-number arithmetic, so every rank and device gets the same.

Shapes: N rows of a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BITS_32 = 0xFFFFFFFF
_UNIFORM_BITS = 24


def more_uniforms(uniforms_N4: Tensor, count: int, stream: int | Tensor) -> Tensor:
    """``count`` further numbers in [0, 1) for each row, float32 [N, count].

    Args:
        uniforms_N4: in [0, 1), of which 24 bits count.
        stream: which of the many sequences that the four begin; a number, or one for each row, int64 [N].
    """
    seed_N = torch.zeros(len(uniforms_N4), dtype=torch.int64, device=uniforms_N4.device)
    for part_N in (uniforms_N4.double() * 2.0**_UNIFORM_BITS).long().unbind(1):
        seed_N = _mixed(seed_N ^ part_N)
    seed_N = _mixed(seed_N ^ (stream & _BITS_32))
    place_K = torch.arange(1, count + 1, device=uniforms_N4.device) * 0x9E3779B9
    bits_NK = _mixed((seed_N[:, None] + place_K) & _BITS_32)
    return (bits_NK >> (32 - _UNIFORM_BITS)).float() * 2.0**-_UNIFORM_BITS


def _mixed(bits: Tensor) -> Tensor:
    """A bijection of 32 bits in which each of them turns about half of the others."""
    for _ in range(2):
        bits = ((bits ^ (bits >> 16)) * 0x45D9F3B) & _BITS_32
    return bits ^ (bits >> 16)
