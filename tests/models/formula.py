"""Weights and sounds from formulas, which any other implementation can be filled with as well.

The golden values beside the tests were made so: the authors' own code, filled by ``fill``, heard ``sound``.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


def noise(name: str, count: int) -> NDArray[np.float64]:
    """Numbers in [-1, 1): bits of a multiplicative hash of each place, begun with the CRC of a name."""
    bits = (np.arange(1, count + 1, dtype=np.uint64) * 2654435761 + zlib.crc32(name.encode())) % 2**32
    for _ in range(2):
        bits = ((bits ^ (bits >> np.uint64(16))) * np.uint64(0x45D9F3B)) % 2**32
    bits ^= bits >> np.uint64(16)
    return bits.astype(np.float64) / 2**31 - 1


def fill(module: nn.Module) -> nn.Module:
    """Every weight and statistic by its name: matrices keep the size of what goes through them."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if not tensor.is_floating_point():
                continue
            values = torch.from_numpy(noise(name, tensor.numel())).view(tensor.shape)
            if name.endswith("running_var"):
                values = 1 + 0.5 * values
            elif tensor.ndim > 1 and "embed" not in name and "token" not in name:
                # Of convolutions somewhat more: part of what they say is cut off, and squeezed.
                values = values * (3 / tensor[0].numel()) ** 0.5 * (1.3 if tensor.ndim == 4 else 1)
            elif tensor.ndim == 1 and name.endswith("weight"):
                values = 1 + 0.2 * values
            else:
                values = 0.3 * values
            tensor.copy_(values)
    return module


def sound(seconds: float, sample_rate_hz: int, num_clips: int = 2) -> Tensor:
    """float32 [N, S] in [-1, 1]: a rising tone of each clip's own, with noise."""
    num_samples = round(seconds * sample_rate_hz)
    time_S = np.arange(num_samples) / sample_rate_hz
    clips = [
        0.4 * np.sin(2 * np.pi * (200 + 300 * number + 350 * time_S) * time_S)
        + 0.05 * noise(f"clip {number}", num_samples)
        for number in range(num_clips)
    ]
    return torch.from_numpy(np.stack(clips)).float()
