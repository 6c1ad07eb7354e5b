"""Raw batches of sound to what towers read, on the device that holds them: waveforms to FBANK or log-mel.

Everything here is float32, under autocast too: a log of small energies does not survive fewer bits.

Shapes: N clips of a batch, S samples, T spectrogram frames, W samples of one, K frequencies of its spectrum, F mel
bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchaudio.compliance.kaldi import get_mel_banks
from torchaudio.functional import resample

from audiotext_dist.errors import UserError, require_positive

LOWEST_FREQUENCY_HZ = 20.0
PREEMPHASIS = 0.97
INT16_FULL_SCALE = 32768.0
# A clip grows about 30-fold on its way to the filter banks. A few at once fit a CPU's cache; a GPU takes the batch, or
# as much of it as so many bytes hold.
CPU_CLIPS_AT_ONCE = 4
GPU_BYTES = 2 << 30
COPIES_OF_FRAMES = 6  # cut, emphasised and padded; their spectrum, its power, and what the FFT itself needs


@dataclass(frozen=True, kw_only=True)
class FbankConfig:
    """Kaldi filter banks, their normalisation, and SpecAugment.

    num_fbank_frames: the length every clip is cut or padded to; 1000 is 10 s. mean, std: of the dataset's
    log-mel energies; the defaults are VIP-ANT's for AudioSet (Zhao et al. 2022). freq_mask_bins,
    time_mask_frames: the widest mask, 0 for none (Park et al. 2019).

    Raises:
        UserError: a mask wider than the spectrogram, or a size that is not positive.
    """

    num_mel_bins: int = 128
    frame_length_ms: float = 25.0
    frame_shift_ms: float = 10.0
    num_fbank_frames: int = 1000
    mean: float = -4.93839311
    std: float = 5.75751113
    freq_mask_bins: int = 32
    time_mask_frames: int = 200

    def __post_init__(self) -> None:
        for name in ("num_mel_bins", "frame_length_ms", "frame_shift_ms", "num_fbank_frames", "std"):
            if getattr(self, name) <= 0:
                raise UserError(f"fbank.{name} is {getattr(self, name)}: give a value above 0")
        limits = {"freq_mask_bins": self.num_mel_bins, "time_mask_frames": self.num_fbank_frames}
        for name, limit in limits.items():
            if not 0 <= getattr(self, name) <= limit:
                raise UserError(f"fbank.{name} is {getattr(self, name)}: give a value from 0 to {limit}")


class Fbank(nn.Module):
    """Normalised Kaldi FBANK of a batch of clips, with SpecAugment where the caller asks for it.

    Equals ``torchaudio.compliance.kaldi.fbank`` with ``htk_compat``, no energy, a Hanning window and no
    dither. VIP-ANT takes the clip's mean from the waveform first; Kaldi takes each frame's, so that is done.
    """

    window_W: Tensor
    mel_bank_KF: Tensor

    def __init__(self, config: FbankConfig, sample_rate_hz: int) -> None:
        super().__init__()
        self.config = config
        # Kaldi truncates both to whole samples.
        self.window_samples = int(sample_rate_hz * config.frame_length_ms * 0.001)
        self.shift_samples = int(sample_rate_hz * config.frame_shift_ms * 0.001)
        if self.window_samples < 2 or self.shift_samples < 1:
            raise UserError(
                f"fbank.frame_length_ms={config.frame_length_ms} and fbank.frame_shift_ms={config.frame_shift_ms} "
                f"are below a sample at {sample_rate_hz} Hz: make them longer"
            )
        self.fft_size = 1 << (self.window_samples - 1).bit_length()
        mel_bank_FK, _ = get_mel_banks(
            num_bins=config.num_mel_bins,
            window_length_padded=self.fft_size,
            sample_freq=float(sample_rate_hz),
            low_freq=LOWEST_FREQUENCY_HZ,
            high_freq=0.0,  # Kaldi's word for Nyquist
            vtln_low=100.0,
            vtln_high=-500.0,
            vtln_warp_factor=1.0,
        )
        # Kaldi's filters leave out the Nyquist bin.
        mel_bank_KF = functional.pad(mel_bank_FK, (0, 1)).T.contiguous()
        self.register_buffer("mel_bank_KF", mel_bank_KF, persistent=False)
        self.register_buffer("window_W", torch.hann_window(self.window_samples, periodic=False), persistent=False)

    def forward(
        self, waveform_NS: Tensor, num_valid_samples_N: Tensor, mask_uniforms_N4: Tensor | None = None
    ) -> Tensor:
        """Log-mel energies minus mean over std; 0, the dataset's mean, in padding and in masks.

        Args:
            waveform_NS: mono, int16 or float in [-1, 1], padded at the end.
            num_valid_samples_N: samples of each clip before its padding.
            mask_uniforms_N4: four numbers in [0, 1) a clip: width and start of the frequency mask, width and
                start of the time mask. Drawn by the caller, so that a clip's masks do not depend on which
                rank meets it. None: no masks.

        Returns:
            float32 [N, 1, num_fbank_frames, num_mel_bins].
        """
        config = self.config
        with torch.autocast(waveform_NS.device.type, enabled=False):
            fbank_NTF = (self.log_mel_energies(waveform_NS) - config.mean) / config.std
            blank_NTF = ~self.is_valid_frame(num_valid_samples_N)[:, :, None]
            if mask_uniforms_N4 is not None:
                u_4N = mask_uniforms_N4.unbind(1)
                blank_NF = span_mask(u_4N[0], u_4N[1], config.freq_mask_bins, config.num_mel_bins)
                blank_NT = span_mask(u_4N[2], u_4N[3], config.time_mask_frames, config.num_fbank_frames)
                blank_NTF = blank_NTF | blank_NF[:, None, :] | blank_NT[:, :, None]
            return fbank_NTF.masked_fill(blank_NTF, 0.0).unsqueeze(1)

    def log_mel_energies(self, waveform_NS: Tensor) -> Tensor:
        """Kaldi's log-mel energies before any normalisation, float32 [N, num_fbank_frames, num_mel_bins]."""
        assert self.mel_bank_KF.dtype == torch.float32, "the frontend was cast to fewer bits"
        num_clips = clips_at_once(waveform_NS.device, self.config.num_fbank_frames, self.fft_size)
        return torch.cat([self._log_mel_energies(chunk_NS) for chunk_NS in torch.split(waveform_NS, num_clips)])

    def _log_mel_energies(self, waveform_NS: Tensor) -> Tensor:
        waveform_NS = _full_scale(waveform_NS)
        num_samples = (self.config.num_fbank_frames - 1) * self.shift_samples + self.window_samples
        # A negative pad cuts.
        waveform_NS = functional.pad(waveform_NS, (0, num_samples - waveform_NS.shape[1]))
        frames_NTW = waveform_NS.unfold(1, self.window_samples, self.shift_samples)
        frames_NTW = frames_NTW - frames_NTW.mean(dim=-1, keepdim=True)
        # The Hanning window begins with 0, so the first sample, which has no previous one, does not count.
        emphasised_NTW = (frames_NTW[..., 1:] - PREEMPHASIS * frames_NTW[..., :-1]) * self.window_W[1:]
        spectrum_NTK = torch.fft.rfft(functional.pad(emphasised_NTW, (1, self.fft_size - self.window_samples)))
        power_NTK = spectrum_NTK.real.square() + spectrum_NTK.imag.square()
        energies_NTF: Tensor = power_NTK @ self.mel_bank_KF
        return energies_NTF.clamp(min=torch.finfo(torch.float32).eps).log()

    def is_valid_frame(self, num_valid_samples_N: Tensor) -> Tensor:
        """True where a frame lies wholly inside its clip, bool [N, num_fbank_frames].

        These are the frames Kaldi makes of the clip alone, so the result does not depend on the padding.
        """
        end_T = (
            torch.arange(self.config.num_fbank_frames, device=num_valid_samples_N.device) * self.shift_samples
            + self.window_samples
        )
        return end_T <= num_valid_samples_N[:, None]


@dataclass(frozen=True, kw_only=True)
class LogMelConfig:
    """PaSST's log-mel energies (Koutini et al. 2022); the defaults are those of its weights, at 32 kHz.

    min_hz_jitter, max_hz_jitter: in training a clip's lowest frequency lies less than so many Hz above 0, its
    highest less than so many below Nyquist; at evaluation they are 0 and the middle of that.
    """

    num_mel_bins: int = 128
    window_samples: int = 800
    hop_samples: int = 320
    fft_size: int = 1024
    min_hz_jitter: int = 10
    max_hz_jitter: int = 2000
    floor: float = 1e-5
    mean: float = -4.5
    std: float = 5.0

    def __post_init__(self) -> None:
        require_positive(self, "log_mel", "num_mel_bins", "window_samples", "hop_samples", "fft_size", "floor", "std")
        require_positive(self, "log_mel", "min_hz_jitter", "max_hz_jitter")
        if self.window_samples > self.fft_size:
            raise UserError(
                f"log_mel.window_samples={self.window_samples} is more than log_mel.fft_size={self.fft_size}: lower it"
            )


class LogMel(nn.Module):
    """Normalised log-mel energies of a batch of clips.

    Padding at a clip's end is silence to it, as it was to PaSST in its training.
    """

    window_W: Tensor

    def __init__(self, config: LogMelConfig, sample_rate_hz: int) -> None:
        super().__init__()
        self.config = config
        self.nyquist_hz = sample_rate_hz / 2
        if config.max_hz_jitter + config.min_hz_jitter > self.nyquist_hz:
            raise UserError(
                f"log_mel.max_hz_jitter={config.max_hz_jitter} leaves no band at {sample_rate_hz} Hz: lower it"
            )
        self.register_buffer("window_W", torch.hann_window(config.window_samples, periodic=False), persistent=False)

    def forward(self, waveform_NS: Tensor, band_uniforms_N2: Tensor | None = None) -> Tensor:
        """Log-mel energies minus mean over std.

        Args:
            waveform_NS: mono, int16 or float in [-1, 1], more than half an FFT long.
            band_uniforms_N2: two numbers in [0, 1) a clip, which place the ends of its band; drawn by the caller,
                so that they belong to the clip. None: the band of evaluation.

        Returns:
            float32 [N, 1, num_mel_bins, T] with T = 1 + (S - 1) // hop_samples.
        """
        config = self.config
        with torch.autocast(waveform_NS.device.type, enabled=False):
            lowest_N = torch.zeros(len(waveform_NS), device=waveform_NS.device)
            highest_N = torch.full_like(lowest_N, self.nyquist_hz - config.max_hz_jitter / 2)
            if band_uniforms_N2 is not None:
                # Whole Hz, as in PaSST.
                lowest_N = (band_uniforms_N2[:, 0] * config.min_hz_jitter).floor()
                highest_N = self.nyquist_hz - (band_uniforms_N2[:, 1] * config.max_hz_jitter).floor()
            mel_bank_NFK = self._mel_bank(lowest_N, highest_N)
            num_frames = 1 + waveform_NS.shape[1] // config.hop_samples
            num_clips = clips_at_once(waveform_NS.device, num_frames, config.fft_size)
            chunks = zip(*(torch.split(each, num_clips) for each in (waveform_NS, mel_bank_NFK)), strict=True)
            energies_NFT = torch.cat([bank_NFK @ self._power(chunk_NS) for chunk_NS, bank_NFK in chunks])
            return (((energies_NFT + config.floor).log() - config.mean) / config.std).unsqueeze(1)

    def _power(self, waveform_NS: Tensor) -> Tensor:
        """Power spectrum of the pre-emphasised clips, frames centred and the ends mirrored, [N, K, T]."""
        config = self.config
        waveform_NS = _full_scale(waveform_NS)
        spectrum_NKT = torch.stft(
            waveform_NS[:, 1:] - PREEMPHASIS * waveform_NS[:, :-1],
            n_fft=config.fft_size,
            hop_length=config.hop_samples,
            win_length=config.window_samples,
            window=self.window_W,
            center=True,
            return_complex=True,
        )
        return spectrum_NKT.real.square() + spectrum_NKT.imag.square()

    def _mel_bank(self, lowest_N: Tensor, highest_N: Tensor) -> Tensor:
        """Kaldi's triangles, equally wide in mel, between each clip's two frequencies in Hz; [N, F, K]."""
        num_bins, num_frequencies = self.config.num_mel_bins, self.config.fft_size // 2 + 1
        lowest_N11, highest_N11 = (_mel(hz_N)[:, None, None] for hz_N in (lowest_N, highest_N))
        width_N11 = (highest_N11 - lowest_N11) / (num_bins + 1)
        left_F1 = torch.arange(num_bins, device=lowest_N.device)[:, None]
        frequency_K = torch.linspace(0, self.nyquist_hz, num_frequencies, device=lowest_N.device)
        # How many widths a frequency lies above the left corner of each triangle, whose peak is at 1.
        above_NFK = (_mel(frequency_K) - lowest_N11) / width_N11 - left_F1
        return torch.minimum(above_NFK, 2 - above_NFK).clamp(min=0)


def clips_at_once(device: torch.device, num_frames: int, fft_size: int) -> int:
    """How many clips of so many spectrogram frames go to their spectra together."""
    if device.type == "cpu":
        return CPU_CLIPS_AT_ONCE
    return max(1, GPU_BYTES // (COPIES_OF_FRAMES * num_frames * fft_size * torch.float32.itemsize))


def resampled(waveform_NS: Tensor, sample_rate_hz: int, wanted_hz: int) -> Tensor:
    """The clips at the rate that a tower wants, float32 in [-1, 1], of int16 or of any float."""
    with torch.autocast(waveform_NS.device.type, enabled=False):
        resampled_NS: Tensor = resample(_full_scale(waveform_NS), sample_rate_hz, wanted_hz)
    return resampled_NS


def _full_scale(waveform_NS: Tensor) -> Tensor:
    """float32 in [-1, 1], of int16 or of any float."""
    scale = INT16_FULL_SCALE if waveform_NS.dtype == torch.int16 else 1.0
    return waveform_NS.float() / scale


def _mel(hz: Tensor) -> Tensor:
    return 1127.0 * (1.0 + hz / 700.0).log()


def span_mask(width_uniform_N: Tensor, start_uniform_N: Tensor, max_width: int, size: int) -> Tensor:
    """One span a row: width uniform in 0..max_width, then start uniform where it fits; bool [N, size].

    Args:
        width_uniform_N: in [0, 1).
        start_uniform_N: in [0, 1).
        max_width: at most ``size``.
        size: positions a row.
    """
    width_N = (width_uniform_N * (max_width + 1)).long()
    start_N = (start_uniform_N * (size - width_N + 1)).long()
    position = torch.arange(size, device=width_uniform_N.device)
    return (position >= start_N[:, None]) & (position < (start_N + width_N)[:, None])
