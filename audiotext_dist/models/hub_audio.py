"""Audio towers of the transformers library: AST, CLAP's HTSAT, and models of the waveform such as wav2vec 2.0.

Each hears what its own feature extractor would make of a clip, made here for the whole batch on its device.

Shapes: N clips, S samples, T frames, F mel bins, D embedding.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import (
    ASTModel,
    AutoFeatureExtractor,
    AutoModel,
    ClapAudioModelWithProjection,
    PreTrainedConfig,
    PreTrainedModel,
)

from audiotext_dist.errors import UserError
from audiotext_dist.models.frontends import Fbank, FbankConfig, resampled
from audiotext_dist.models.hub import compute_activations_again, hub_config, hub_errors, hub_model

_WAVEFORM_MODELS = ("wav2vec2", "hubert", "wavlm", "data2vec-audio", "unispeech-sat")
_KEY = "model.audio.name"


class HubAudioTower(nn.Module):
    """Waveforms to embeddings, not normalised. It has no augmentation of its own but dropout.

    Args:
        name: on the hub, or a local folder, for the sizes and the feature extractor.
        pretrained: as ``name``, for the weights; None is random.

    Raises:
        UserError: it cannot be loaded, or is of a kind that is not known here.
    """

    def __init__(self, name: str, pretrained: str | None, sample_rate_hz: int) -> None:
        super().__init__()
        with hub_errors(_KEY, name):
            extractor: Any = AutoFeatureExtractor.from_pretrained(name)  # type: ignore[no-untyped-call]
        self.sample_rate_hz = sample_rate_hz
        self.own_rate_hz: int = extractor.sampling_rate
        self.encoder: AstEncoder | ClapEncoder | WaveformEncoder
        sizes = hub_config(_KEY, name, dropout=None)
        match sizes.model_type:
            case "audio-spectrogram-transformer":
                self.encoder = AstEncoder(sizes, extractor, pretrained)
            case "clap" | "clap_audio_model":
                self.encoder = ClapEncoder(getattr(sizes, "audio_config", sizes), extractor, pretrained)
            case kind if kind in _WAVEFORM_MODELS:
                self.encoder = WaveformEncoder(sizes, extractor, pretrained)
            case kind:
                known = ", ".join(("AST", "CLAP", *_WAVEFORM_MODELS))
                raise UserError(f"{_KEY}={name} is a {kind}, which is not known as an audio tower: choose of {known}")
        self.embed_dim: int = self.encoder.embed_dim
        self.train()

    def train(self, mode: bool = True) -> Self:
        """Training mode, but for the statistics of batches: a clip's embedding depends on no other clip."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    @property
    def grad_checkpointing(self) -> bool:
        """True where the backward computes the activations again."""
        return bool(self.encoder.model.is_gradient_checkpointing)

    @grad_checkpointing.setter
    def grad_checkpointing(self, again: bool) -> None:
        if again:
            compute_activations_again(self.encoder.model)

    def forward(
        self, waveform_NS: Tensor, num_valid_samples_N: Tensor, mask_uniforms_N4: Tensor | None = None
    ) -> Tensor:
        """[N, embed_dim].

        Args:
            waveform_NS: int16, or float in [-1, 1], zeros after each clip's end.
            num_valid_samples_N: samples of each clip before its padding.

        Raises:
            UserError: clips longer than the model hears.
        """
        seconds, heard = waveform_NS.shape[1] / self.sample_rate_hz, self.encoder.max_samples / self.own_rate_hz
        if seconds > heard + 0.03:  # what is less than one frame is lost to the feature extractors too
            raise UserError(
                f"clips of {seconds:g} s are longer than the {heard:g} s that the audio tower hears: "
                f"set model.audio.window_seconds={heard:g}"
            )
        with torch.autocast(waveform_NS.device.type, enabled=False):
            waveform_NS = resampled(waveform_NS, self.sample_rate_hz, self.own_rate_hz)
            num_valid_N = num_valid_samples_N * self.own_rate_hz // self.sample_rate_hz
            heard_N = self.encoder.frontend(waveform_NS, num_valid_N.clamp(min=1))
        embedding_ND: Tensor = self.encoder(*heard_N)
        return embedding_ND


class AstEncoder(nn.Module):
    """The Audio Spectrogram Transformer (Gong et al. 2021); the mean of its two special tokens."""

    def __init__(self, sizes: PreTrainedConfig, extractor: Any, pretrained: str | None) -> None:
        super().__init__()
        self.extractor = extractor
        config = FbankConfig(
            num_mel_bins=extractor.num_mel_bins,
            num_fbank_frames=extractor.max_length,
            time_mask_frames=0,
            freq_mask_bins=0,
        )
        self.fbank = Fbank(config, extractor.sampling_rate)
        self.max_samples = self.fbank.window_samples + (extractor.max_length - 1) * self.fbank.shift_samples
        self.model: PreTrainedModel = hub_model("model.audio.pretrained", ASTModel, sizes, pretrained)
        self.embed_dim = sizes.hidden_size

    def frontend(self, waveform_NS: Tensor, num_valid_N: Tensor) -> tuple[Tensor]:
        """FBANK as its feature extractor makes it, padded with zeros before the normalisation; [N, T, F]."""
        is_sound_NT = self.fbank.is_valid_frame(num_valid_N)
        fbank_NTF = self.fbank.log_mel_energies(waveform_NS).where(is_sound_NT[:, :, None], 0.0)
        if self.extractor.do_normalize:
            fbank_NTF = (fbank_NTF - self.extractor.mean) / (2 * self.extractor.std)
        return (fbank_NTF,)

    def forward(self, fbank_NTF: Tensor) -> Tensor:
        """[N, embed_dim]."""
        embedding_ND: Tensor = self.model(fbank_NTF).pooler_output
        return embedding_ND


class ClapEncoder(nn.Module):
    """CLAP's HTSAT with its projection (Wu et al. 2023)."""

    mel_bank_KF: Tensor
    window_W: Tensor

    def __init__(self, sizes: PreTrainedConfig, extractor: Any, pretrained: str | None) -> None:
        super().__init__()
        self.extractor = extractor
        self.max_samples: int = extractor.nb_max_samples
        self.is_fused = bool(sizes.enable_fusion)
        mel_bank_KF = extractor.mel_filters if extractor.truncation == "fusion" else extractor.mel_filters_slaney
        self.register_buffer("mel_bank_KF", torch.from_numpy(mel_bank_KF).float(), persistent=False)
        self.register_buffer("window_W", torch.hann_window(extractor.fft_window_size), persistent=False)
        self.model: PreTrainedModel = hub_model(
            "model.audio.pretrained", ClapAudioModelWithProjection, sizes, pretrained
        )
        self.embed_dim = sizes.projection_dim

    def frontend(self, waveform_NS: Tensor, num_valid_N: Tensor) -> tuple[Tensor]:
        """Decibels of mel energies of the clip, which fills the time as its feature extractor says; [N, 1, T, F]."""
        place_S = torch.arange(self.max_samples, device=waveform_NS.device)
        length_N1 = num_valid_N.clamp(max=self.max_samples)[:, None]
        match self.extractor.padding:
            case "repeatpad":
                end_N1 = self.max_samples // length_N1 * length_N1
            case "repeat":
                end_N1 = torch.full_like(length_N1, self.max_samples)
            case _:
                end_N1 = length_N1
        filled_NS = waveform_NS.gather(1, place_S % length_N1).masked_fill(place_S >= end_N1, 0.0)
        spectrum_NKT = torch.stft(
            filled_NS,
            self.extractor.fft_window_size,
            self.extractor.hop_length,
            window=self.window_W,
            return_complex=True,
        )
        power_NTK = (spectrum_NKT.real.square() + spectrum_NKT.imag.square()).mT
        return (10 * (power_NTK @ self.mel_bank_KF).clamp(min=1e-10).log10()[:, None],)

    def forward(self, mel_N1TF: Tensor) -> Tensor:
        """[N, embed_dim]."""
        if self.is_fused:
            # The clip stands in place of each of the parts of a longer one.
            longer_N1 = torch.zeros(len(mel_N1TF), 1, dtype=torch.bool, device=mel_N1TF.device)
            found = self.model(input_features=mel_N1TF.expand(-1, 4, -1, -1), is_longer=longer_N1)
        else:
            found = self.model(input_features=mel_N1TF)
        embedding_ND: Tensor = found.audio_embeds
        return embedding_ND


class WaveformEncoder(nn.Module):
    """A model that reads samples; the mean of its last states over the clip's sound."""

    def __init__(self, sizes: PreTrainedConfig, extractor: Any, pretrained: str | None) -> None:
        super().__init__()
        self.extractor = extractor
        self.max_samples = 60 * extractor.sampling_rate  # more than a device would hold
        # Their own masks are drawn on the CPU without a seed; a layer that is left out has no gradient.
        sizes.apply_spec_augment, sizes.layerdrop = False, 0.0
        self.model: PreTrainedModel = hub_model("model.audio.pretrained", AutoModel, sizes, pretrained)
        self.embed_dim = sizes.hidden_size

    def frontend(self, waveform_NS: Tensor, num_valid_N: Tensor) -> tuple[Tensor, Tensor]:
        """The samples, each clip's with mean 0 and variance 1 where its feature extractor says so; and their count."""
        is_sound_NS = torch.arange(waveform_NS.shape[1], device=waveform_NS.device) < num_valid_N[:, None]
        if self.extractor.do_normalize:
            num_valid_N1 = num_valid_N[:, None]
            centred_NS = waveform_NS - waveform_NS.where(is_sound_NS, 0).sum(dim=1, keepdim=True) / num_valid_N1
            variance_N1 = centred_NS.where(is_sound_NS, 0).square().sum(dim=1, keepdim=True) / num_valid_N1
            waveform_NS = centred_NS * (variance_N1 + 1e-7).rsqrt()
        return waveform_NS.where(is_sound_NS, 0), num_valid_N

    def forward(self, waveform_NS: Tensor, num_valid_N: Tensor) -> Tensor:
        """[N, embed_dim]."""
        place_S = torch.arange(waveform_NS.shape[1], device=waveform_NS.device)
        # Models whose first norm is over time were trained without a mask, on zeros.
        mask_NS = (place_S < num_valid_N[:, None]).long() if self.extractor.return_attention_mask else None
        states_NTD: Tensor = self.model(waveform_NS, attention_mask=mask_NS).last_hidden_state
        for kernel, stride in zip(self.model.config.conv_kernel, self.model.config.conv_stride, strict=True):
            num_valid_N = (num_valid_N - kernel) // stride + 1
        num_frames_N = num_valid_N.clamp(min=1)
        is_sound_NT = torch.arange(states_NTD.shape[1], device=states_NTD.device) < num_frames_N[:, None]
        sum_ND: Tensor = (states_NTD * is_sound_NT[:, :, None]).sum(dim=1)
        return sum_ND / num_frames_N[:, None]
