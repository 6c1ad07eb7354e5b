"""ATST-Frame: a transformer over whole columns of a mel spectrogram, 40 ms each.

Li, Shao, Li 2024, "Self-supervised Audio Teacher-Student Transformer for Both Clip-level and Frame-level Tasks"
(arXiv:2306.04186).

    waveform -> mel in dB, within 80 of the clip's loudest, scaled to about [-1, 1] -> columns of four frames
             -> plus their positions -> transformer -> mean over the columns that hold sound

Shapes: N clips, S samples, F mel bins, T frames, P columns, C width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchaudio.functional import melscale_fbanks

from audiotext_dist.errors import require_positive
from audiotext_dist.models.frontends import resampled
from audiotext_dist.models.vit import VIT_EPS, init_linear, run_blocks, vit_blocks


@dataclass(frozen=True, kw_only=True)
class AtstConfig:
    """ATST-Frame; the defaults are its base model's.

    min_db, max_db: what the spectrogram is scaled from, to -1 and 1. max_frames: how many frames there are positions
    for. patch_frames: frames of a column.
    """

    sample_rate_hz: int = 16000
    num_mel_bins: int = 64
    min_hz: float = 60.0
    max_hz: float = 7800.0
    fft_size: int = 1024
    hop_samples: int = 160
    dynamic_range_db: float = 80.0
    min_db: float = -79.6482
    max_db: float = 50.6842
    max_frames: int = 1001
    patch_frames: int = 4
    width: int = 768
    depth: int = 12
    num_heads: int = 12

    def __post_init__(self) -> None:
        require_positive(self, "atst", "sample_rate_hz", "num_mel_bins", "max_hz", "fft_size", "hop_samples")
        require_positive(self, "atst", "dynamic_range_db", "max_frames", "patch_frames", "width", "depth", "num_heads")

    @property
    def max_seconds(self) -> float:
        """The longest clip whose columns all have a position."""
        max_frames = (self.max_frames // self.patch_frames + 1) * self.patch_frames - 1
        return (max_frames - 1) * self.hop_samples / self.sample_rate_hz


class AtstTower(nn.Module):
    """Waveforms to embeddings, not normalised, of the columns that lie inside each clip.

    It has no augmentation of its own.
    """

    window_W: Tensor
    mel_bank_KF: Tensor

    def __init__(self, config: AtstConfig, sample_rate_hz: int) -> None:
        super().__init__()
        self.config = config
        self.sample_rate_hz = sample_rate_hz
        mel_bank_KF = melscale_fbanks(
            config.fft_size // 2 + 1, config.min_hz, config.max_hz, config.num_mel_bins, config.sample_rate_hz
        )
        self.register_buffer("mel_bank_KF", mel_bank_KF, persistent=False)
        self.register_buffer("window_W", torch.hann_window(config.fft_size), persistent=False)
        self.transformer = AtstTransformer(config)
        self.embed_dim = config.width

    def forward(
        self, waveform_NS: Tensor, num_valid_samples_N: Tensor, mask_uniforms_N4: Tensor | None = None
    ) -> Tensor:
        """[N, embed_dim].

        Args:
            waveform_NS: int16, or float in [-1, 1].
            num_valid_samples_N: samples of each clip before its padding.
        """
        config = self.config
        waveform_NS = resampled(waveform_NS, self.sample_rate_hz, config.sample_rate_hz)
        num_valid_N = num_valid_samples_N * config.sample_rate_hz // self.sample_rate_hz
        # Frames are centred: one more than whole hops.
        num_columns_N = (num_valid_N // config.hop_samples + 1) // config.patch_frames
        embedding_NC: Tensor = self.transformer(self.mel_db(waveform_NS), num_columns_N.clamp(min=1))
        return embedding_NC

    def mel_db(self, waveform_NS: Tensor) -> Tensor:
        """Decibels of mel energies, scaled, float32 [N, F, T]; no frame lies more than 80 dB below the clip's peak."""
        config = self.config
        with torch.autocast(waveform_NS.device.type, enabled=False):
            spectrum_NKT = torch.stft(
                waveform_NS, config.fft_size, config.hop_samples, window=self.window_W, return_complex=True
            )
            power_NKT = spectrum_NKT.real.square() + spectrum_NKT.imag.square()
            db_NFT = 10 * (self.mel_bank_KF.T @ power_NKT).clamp(min=1e-10).log10()
            db_NFT = db_NFT.maximum(db_NFT.amax(dim=(1, 2), keepdim=True) - config.dynamic_range_db)
            return (db_NFT - config.min_db) / (config.max_db - config.min_db) * 2 - 1


class AtstTransformer(nn.Module):
    """The network, with the parameters' names of the published weights; ``mask_embed`` serves their training alone."""

    def __init__(self, config: AtstConfig) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpointing = False
        patch_size = config.num_mel_bins * config.patch_frames
        self.patch_embed = nn.ModuleDict({"patch_embed": nn.Linear(patch_size, config.width)})
        # Its first row is for a CLS token that this model does not have.
        self.pos_embed = nn.Parameter(torch.zeros(1, config.max_frames // config.patch_frames + 1, config.width))
        self.blocks = vit_blocks(config.depth, config.width, config.num_heads, qkv_bias=False)
        self.norm_frame = nn.LayerNorm(config.width, eps=VIT_EPS)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_linear)

    def forward(self, mel_NFT: Tensor, num_columns_N: Tensor) -> Tensor:
        """float32 [N, F, T] and the columns of each clip that hold sound -> [N, width]."""
        config = self.config
        num_columns = mel_NFT.shape[2] // config.patch_frames
        assert num_columns < self.pos_embed.shape[1], f"{num_columns} columns, positions for {self.pos_embed.shape[1]}"
        columns_NFPK = mel_NFT[..., : num_columns * config.patch_frames].reshape(
            *mel_NFT.shape[:2], num_columns, config.patch_frames
        )
        # A patch is read bin by bin, each with its frames in order.
        patches_NPK = columns_NFPK.transpose(1, 2).flatten(2)
        tokens_NPC = self.patch_embed["patch_embed"](patches_NPK) + self.pos_embed[:, 1 : num_columns + 1]
        is_sound_NP = torch.arange(num_columns, device=mel_NFT.device) < num_columns_N[:, None]
        tokens_NPC = run_blocks(self.blocks, tokens_NPC, is_sound_NP, again=self.grad_checkpointing)
        sum_NC: Tensor = (self.norm_frame(tokens_NPC) * is_sound_NP[:, :, None]).sum(dim=1)
        return sum_NC / num_columns_N.clamp(max=num_columns)[:, None]
