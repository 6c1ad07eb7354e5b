"""A long clip in windows: the audio tower hears each window that holds sound, and the clip is their mean.

The windows of all clips go through the tower as one batch, and those of padding alone do not: a clip of 10 s costs a
third of one of 30 s.

Shapes: N clips, S samples, P windows of all clips, W samples of one, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from audiotext_dist.models.uniforms import more_uniforms

# waveform_PW, num_valid_samples_P, mask_uniforms_P4 -> embedding_PD
Encode = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Of so many samples, one every ``hop_samples``, at most as many."""

    window_samples: int
    hop_samples: int

    def mean(
        self, encode: Encode, waveform_NS: Tensor, num_valid_samples_N: Tensor, mask_uniforms_N4: Tensor | None = None
    ) -> Tensor:
        """The mean embedding of each clip's windows, [N, D].

        A clip's first window counts always, another one where it holds sound that the one before does not.

        Args:
            encode: an audio tower.
            mask_uniforms_N4: of the first window; the others get numbers made of them.
        """
        num_clips, num_samples = waveform_NS.shape
        max_windows = 1 + -(-max(num_samples - self.window_samples, 0) // self.hop_samples)
        padding = self.window_samples + (max_windows - 1) * self.hop_samples - num_samples
        windows_NMW = functional.pad(waveform_NS, (0, padding)).unfold(1, self.window_samples, self.hop_samples)
        start_M = torch.arange(max_windows, device=waveform_NS.device) * self.hop_samples
        heard_before_M = (start_M + self.window_samples - self.hop_samples).where(start_M > 0, -1)
        clip_P, number_P = (heard_before_M < num_valid_samples_N[:, None]).nonzero(as_tuple=True)
        num_valid_P = (num_valid_samples_N[clip_P] - start_M[number_P]).clamp(max=self.window_samples)
        uniforms_P4 = None
        if mask_uniforms_N4 is not None:
            own_P4 = mask_uniforms_N4[clip_P]
            uniforms_P4 = own_P4.where((number_P == 0)[:, None], more_uniforms(own_P4, 4, stream=number_P))
        embedding_PD = encode(windows_NMW[clip_P, number_P], num_valid_P, uniforms_P4).float()
        sum_ND = embedding_PD.new_zeros(num_clips, embedding_PD.shape[1]).index_add(0, clip_P, embedding_PD)
        return sum_ND / torch.bincount(clip_P, minlength=num_clips)[:, None]
