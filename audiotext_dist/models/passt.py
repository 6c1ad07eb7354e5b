"""PaSST: a vision transformer over log-mel patches that leaves out rows and columns of them in training.

Koutini et al. 2022, "Efficient Training of Audio Transformers with Patchout" (arXiv:2110.05069).

    waveform -> log-mel [N, 1, mel, time] -> patches, plus where in time, plus where in frequency
             -> patchout (training) -> two special tokens before them -> transformer -> mean of the two

Shapes: N clips, C width, F and T rows and columns of patches, P tokens, D embedding.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from audiotext_dist.errors import UserError, require_positive
from audiotext_dist.models.frontends import LogMel, LogMelConfig, resampled
from audiotext_dist.models.uniforms import more_uniforms
from audiotext_dist.models.vit import VIT_EPS, init_linear, run_blocks, vit_blocks

_TIME_STREAM, _FREQUENCY_STREAM = -1, -2


@dataclass(frozen=True, kw_only=True)
class PasstConfig:
    """PaSST; the defaults are passt_s_p16_s16_128_ap468.

    stride: of the 16x16 patches, 10 in some published weights. max_frames: how many of the log-mel's frames there are
    positions for; a shorter clip takes the first of them. patchout_time, patchout_frequency: columns and rows of
    patches that each clip loses in training.
    """

    sample_rate_hz: int = 32000
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    patch_size: int = 16
    stride: int = 16
    max_frames: int = 998
    patchout_time: int = 15
    patchout_frequency: int = 2
    log_mel: LogMelConfig = field(default_factory=LogMelConfig)

    def __post_init__(self) -> None:
        positive = ("sample_rate_hz", "width", "depth", "num_heads", "patch_size", "stride", "max_frames")
        require_positive(self, "passt", *positive)
        for name, size in (("patchout_time", self.grid[1]), ("patchout_frequency", self.grid[0])):
            if not 0 <= getattr(self, name) < size:
                raise UserError(f"passt.{name}={getattr(self, name)} must be from 0 to {size - 1}, of {size} patches")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches that have a position."""
        return self.log_mel.num_mel_bins // self.stride, self.max_frames // self.stride

    @property
    def max_seconds(self) -> float:
        """The longest clip whose patches all have a position."""
        max_frames = self.grid[1] * self.stride + self.patch_size - 1
        return max_frames * self.log_mel.hop_samples / self.sample_rate_hz

    def num_columns(self, num_samples: int) -> int:
        """Columns of patches in so many samples at ``sample_rate_hz``, may be more than have a position."""
        num_frames = 1 + (num_samples - 1) // self.log_mel.hop_samples
        return (num_frames - self.patch_size) // self.stride + 1


class PasstTower(nn.Module):
    """Waveforms to embeddings, not normalised. Padding is silence to it."""

    def __init__(self, config: PasstConfig, sample_rate_hz: int) -> None:
        super().__init__()
        self.config = config
        self.sample_rate_hz = sample_rate_hz
        self.log_mel = LogMel(config.log_mel, config.sample_rate_hz)
        self.transformer = PasstTransformer(config)
        self.embed_dim = config.width

    def forward(
        self, waveform_NS: Tensor, num_valid_samples_N: Tensor, mask_uniforms_N4: Tensor | None = None
    ) -> Tensor:
        """[N, embed_dim].

        Args:
            waveform_NS: int16, or float in [-1, 1], zeros after each clip's end.
            mask_uniforms_N4: in [0, 1): two place the ends of the mel band, all four choose the patches that are left
                out. None: the band of evaluation, every patch.
        """
        waveform_NS = resampled(waveform_NS, self.sample_rate_hz, self.config.sample_rate_hz)
        band_uniforms_N2 = None if mask_uniforms_N4 is None else mask_uniforms_N4[:, :2]
        embedding_ND: Tensor = self.transformer(self.log_mel(waveform_NS, band_uniforms_N2), mask_uniforms_N4)
        return embedding_ND


class PasstTransformer(nn.Module):
    """The network, with the parameters' names of the published weights; without their classifier."""

    def __init__(self, config: PasstConfig) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpointing = False
        width, (num_rows, num_columns) = config.width, config.grid
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(1, width, config.patch_size, config.stride)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, width))
        self.new_pos_embed = nn.Parameter(torch.zeros(1, 2, width))
        self.freq_new_pos_embed = nn.Parameter(torch.zeros(1, width, num_rows, 1))
        self.time_new_pos_embed = nn.Parameter(torch.zeros(1, width, 1, num_columns))
        self.blocks = vit_blocks(config.depth, width, config.num_heads, qkv_bias=True)
        self.norm = nn.LayerNorm(width, eps=VIT_EPS)
        for parameter in self.parameters(recurse=False):
            nn.init.trunc_normal_(parameter, std=0.02)
        self.apply(init_linear)

    def forward(self, log_mel_N1FT: Tensor, uniforms_N4: Tensor | None = None) -> Tensor:
        """float32 [N, 1, mel bins, frames] -> [N, width]."""
        patches_NCFT = self.patch_embed["proj"](log_mel_N1FT)
        num_columns, num_known = patches_NCFT.shape[3], self.config.grid[1]
        assert num_columns <= num_known, f"{num_columns} columns of patches, positions for {num_known}"
        patches_NCFT = patches_NCFT + self.time_new_pos_embed[..., :num_columns] + self.freq_new_pos_embed
        if uniforms_N4 is not None:
            drop_F, drop_T = self.config.patchout_frequency, self.config.patchout_time
            patches_NCFT = _patchout(patches_NCFT, 3, drop_T, uniforms_N4, _TIME_STREAM)
            patches_NCFT = _patchout(patches_NCFT, 2, drop_F, uniforms_N4, _FREQUENCY_STREAM)
        special_12C = torch.cat([self.cls_token, self.dist_token], dim=1) + self.new_pos_embed
        special_N2C = special_12C.expand(len(patches_NCFT), -1, -1)
        tokens_NPC = torch.cat([special_N2C, patches_NCFT.flatten(2).transpose(1, 2)], dim=1)
        tokens_NPC = run_blocks(self.blocks, tokens_NPC, again=self.grad_checkpointing)
        embedding_NC: Tensor = self.norm(tokens_NPC[:, :2]).mean(dim=1)
        return embedding_NC


def _patchout(patches_NCFT: Tensor, dim: int, num_dropped: int, uniforms_N4: Tensor, stream: int) -> Tensor:
    """Each clip without some rows (``dim`` 2) or columns (3) of its own; the others keep their order."""
    size = patches_NCFT.shape[dim]
    # In their order of chance, the first ones stay.
    order_NK = more_uniforms(uniforms_N4, size, stream).argsort(dim=1, stable=True)
    kept_NK = order_NK[:, : size - num_dropped].sort(dim=1).values
    index = kept_NK[:, None, None, :] if dim == 3 else kept_NK[:, None, :, None]
    shape = list(patches_NCFT.shape)
    shape[dim] = kept_NK.shape[1]
    return patches_NCFT.gather(dim, index.expand(shape))
