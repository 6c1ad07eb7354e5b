from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from open_clip.transform import image_transform
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchaudio.compliance import kaldi

from audiotext_dist.errors import UserError
from audiotext_dist.models.frontends import Fbank, FbankConfig, LogMel, LogMelConfig, span_mask
from audiotext_dist.models.image import ImageTransform

REAL_DATA = Path(__file__).parents[3] / "shared" / "data"
# Noise at full scale, the hardest case for float32: 1e-5 of log energies, which reach -16.
ATOL = 1.6e-4
UNIFORM = st.floats(0, 1, exclude_max=True, width=32)
BARE = FbankConfig(mean=0.0, std=1.0)
SHORT = FbankConfig(num_fbank_frames=60, time_mask_frames=20, freq_mask_bins=32)


def kaldi_fbank(waveform_S: Tensor, sample_rate_hz: int) -> Tensor:
    return kaldi.fbank(
        waveform_S[None],
        htk_compat=True,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=128,
        dither=0.0,
        frame_shift=10,
        sample_frequency=sample_rate_hz,
    )


def random_clips(num_clips: int, num_samples: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-20_000, 20_000, (num_clips, num_samples), generator=generator, dtype=torch.int16)


@pytest.mark.parametrize("sample_rate_hz", [8000, 16000, 22050, 32000, 44100, 48000])
def test_fbank_equals_kaldi_at_any_sample_rate(sample_rate_hz: int) -> None:
    clips_NS = random_clips(num_clips=10, num_samples=sample_rate_hz)
    num_valid_N = torch.full((10,), sample_rate_hz)
    fbank_N1TF = Fbank(BARE, sample_rate_hz)(clips_NS, num_valid_N)
    for clip_S, fbank_1TF in zip(clips_NS, fbank_N1TF, strict=True):
        expected_TF = kaldi_fbank(clip_S / 32768, sample_rate_hz)
        torch.testing.assert_close(fbank_1TF[0, : len(expected_TF)], expected_TF, atol=ATOL, rtol=0)


def recordings(folder: str, every: int) -> list[tuple[Tensor, int]]:
    """Some of the real clips, int16, and their sample rates."""
    paths = sorted((REAL_DATA / folder).rglob("*.ogg"))[::every]
    if not paths:
        pytest.skip(f"no recordings at {REAL_DATA / folder}")
    return [(torch.from_numpy(samples), rate) for samples, rate in (soundfile.read(p, dtype="int16") for p in paths)]


@pytest.mark.parametrize(("folder", "every"), [("esc", 36), ("urbansound8k", 120)])
def test_fbank_equals_kaldi_on_recordings(folder: str, every: int) -> None:
    for clip_S, sample_rate_hz in recordings(folder, every):
        fbank_TF = Fbank(BARE, sample_rate_hz)(clip_S[None], torch.tensor([len(clip_S)]))[0, 0]
        expected_TF = kaldi_fbank(clip_S / 32768, sample_rate_hz)
        torch.testing.assert_close(fbank_TF[: len(expected_TF)], expected_TF, atol=1e-5, rtol=0)


def log_mel_by_definition(samples: NDArray[np.int16], lowest_hz: float, highest_hz: float) -> NDArray[np.float64]:
    """PaSST's frontend at 32 kHz, frame by frame in float64, with torchaudio's filters; [128, frames]."""
    sound = samples / 32768
    sound = np.pad(sound[1:] - 0.97 * sound[:-1], 512, mode="reflect")
    window = np.pad(np.sin(np.pi * np.arange(800) / 799) ** 2, 112)
    frames = [sound[start : start + 1024] * window for start in range(0, len(sound) - 1023, 320)]
    power = np.abs(np.fft.rfft(np.stack(frames))) ** 2
    bank, _ = kaldi.get_mel_banks(128, 1024, 32000.0, lowest_hz, highest_hz, 100.0, -500.0, 1.0)
    return (np.log(bank.double().numpy() @ power[:, :-1].T + 1e-5) + 4.5) / 5


def test_log_mel_is_passts_on_recordings() -> None:
    log_mel = LogMel(LogMelConfig(), 32000)
    for clip_S, sample_rate_hz in recordings("esc", 120):
        assert sample_rate_hz == 32000
        expected = log_mel_by_definition(clip_S.numpy(), 0.0, 15000.0)
        found = log_mel(clip_S[None])
        assert found.shape == (1, 1, 128, 1 + (len(clip_S) - 1) // 320)
        np.testing.assert_allclose(found[0, 0].numpy(), expected, atol=5e-5)


def test_log_mel_of_a_sine_peaks_where_the_mel_scale_says() -> None:
    time = torch.arange(32000) / 32000
    clips_NS = torch.stack([0.5 * torch.sin(2 * torch.pi * hz * time) for hz in (440, 1000, 4000, 12000)])
    peaks = LogMel(LogMelConfig(), 32000)(clips_NS)[:, 0, :, 50].argmax(dim=1)
    # 128 peaks, equally far apart in mel between 0 and mel(15000 Hz) = 3502.3
    mels = 1127 * np.log1p(np.array([440, 1000, 4000, 12000]) / 700)
    assert peaks.tolist() == np.rint(mels / (3502.3 / 129) - 1).astype(int).tolist()


def test_each_clip_has_its_own_band_in_training() -> None:
    clips_NS = random_clips(num_clips=10, num_samples=16000)
    almost_one = 1 - 2**-24
    uniforms_N2 = torch.tensor([[0.0, 0.0], [almost_one, almost_one], *[[0.35, 0.62]] * 8])
    found = LogMel(LogMelConfig(), 32000)(clips_NS, uniforms_N2)
    bands = [(0.0, 16000.0), (9.0, 14001.0), *[(3.0, 14760.0)] * 8]
    for clip_S, one, band in zip(clips_NS, found, bands, strict=True):
        np.testing.assert_allclose(one[0].numpy(), log_mel_by_definition(clip_S.numpy(), *band), atol=1e-4)


@pytest.mark.parametrize(("seconds", "num_frames"), [(10, 1000), (30, 3000)])
def test_log_mel_has_a_hundred_frames_a_second(seconds: int, num_frames: int) -> None:
    assert LogMel(LogMelConfig(), 32000)(torch.zeros(1, 32000 * seconds)).shape == (1, 1, 128, num_frames)


def test_log_mel_of_int16_and_of_float_are_the_same_under_autocast_too() -> None:
    clips_NS = random_clips(num_clips=2, num_samples=8000)
    log_mel = LogMel(LogMelConfig(), 32000)
    expected = log_mel(clips_NS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(log_mel(clips_NS / 32768), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window_samples": 2000}, r"log_mel\.window_samples=2000 is more than log_mel\.fft_size=1024"),
        ({"hop_samples": 0}, r"log_mel\.hop_samples"),
        ({"max_hz_jitter": 15995}, r"log_mel\.max_hz_jitter=15995"),
    ],
)
def test_an_impossible_log_mel_is_refused_by_its_key(changes: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LogMel(LogMelConfig(**changes), 32000)


def _frontends_and_inputs(device: str) -> list[tuple[nn.Module, tuple[Tensor, ...]]]:
    clips_NS, uniforms_N4 = random_clips(num_clips=10, num_samples=16000).to(device), torch.rand(10, 4).to(device)
    frames_NHWC = torch.randint(0, 256, (3, 40, 60, 3), dtype=torch.uint8).to(device)
    num_valid_N = torch.full((10,), 9000).to(device)
    return [
        (Fbank(SHORT, 16000).to(device), (clips_NS, num_valid_N, uniforms_N4)),
        (LogMel(LogMelConfig(), 32000).to(device), (clips_NS, uniforms_N4[:, :2])),
        (ImageTransform(32, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)).to(device), (frames_NHWC,)),
    ]


def test_frontends_stay_on_the_device_of_their_batch() -> None:
    # Tensors without content that claim to be on a GPU: one made on the CPU on the way would not go with them.
    with FakeTensorMode():
        for module, inputs in _frontends_and_inputs("cuda"):
            found = module(*inputs)
            assert (found.device.type, found.dtype, len(found)) == ("cuda", torch.float32, len(inputs[0]))


def test_a_gpu_takes_as_much_of_a_batch_at_once_as_its_memory_bound_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    for frontend, spectrum in ((Fbank, "_log_mel_energies"), (LogMel, "_power")):
        own = getattr(frontend, spectrum)

        def note(self: nn.Module, clips_NS: Tensor, own: Callable[[nn.Module, Tensor], Tensor] = own) -> Tensor:
            sizes.append(len(clips_NS))
            return own(self, clips_NS)

        monkeypatch.setattr(frontend, spectrum, note)

    def taken(num_clips: int, seconds: int) -> list[int]:
        sizes.clear()
        with FakeTensorMode():
            clips_NS = torch.zeros(num_clips, seconds * 32000, dtype=torch.int16, device="cuda")
            Fbank(FbankConfig(num_fbank_frames=100 * seconds), 32000).cuda().log_mel_energies(clips_NS)
            LogMel(LogMelConfig(), 32000).cuda()(clips_NS)
        return sizes

    assert taken(64, 10) == [64, 64]
    assert taken(100, 10) == [87, 13, 87, 13]
    assert taken(2, 1800) == [1, 1, 1, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_frontends_say_the_same_on_a_gpu() -> None:
    for module, inputs in _frontends_and_inputs("cuda"):
        found = module(*inputs).cpu()
        torch.testing.assert_close(found, module.cpu()(*(each.cpu() for each in inputs)), atol=1e-3, rtol=0)


@pytest.mark.parametrize("num_frames", [50, 98, 99, 150])
def test_fbank_is_cut_or_padded_after_normalisation(num_frames: int) -> None:
    config = FbankConfig(num_fbank_frames=num_frames, time_mask_frames=0)
    clips_NS = random_clips(num_clips=1, num_samples=16000)
    fbank_TF = Fbank(config, 16000)(clips_NS, torch.tensor([16000]))[0, 0]
    expected_TF = (kaldi_fbank(clips_NS[0] / 32768, 16000) - config.mean) / config.std
    assert fbank_TF.shape == (num_frames, 128)
    torch.testing.assert_close(fbank_TF[:98], expected_TF[:num_frames], atol=ATOL, rtol=0)
    assert not fbank_TF[98:].any()


@settings(deadline=None, max_examples=30)
@example(num_valid=400 + 7 * 160, padding=100, seed=0)
@example(num_valid=399, padding=1, seed=0)
@given(num_valid=st.integers(0, 12_000), padding=st.integers(0, 3000), seed=st.integers(0, 99))
def test_fbank_does_not_depend_on_what_follows_the_clip(num_valid: int, padding: int, seed: int) -> None:
    fbank = Fbank(SHORT, 16000)
    padded_NS = random_clips(num_clips=1, num_samples=num_valid + padding, seed=seed)
    num_valid_N = torch.tensor([num_valid])
    alone = fbank(padded_NS[:, :num_valid], num_valid_N)
    torch.testing.assert_close(fbank(padded_NS, num_valid_N), alone, atol=ATOL, rtol=0)
    num_frames = min(60, max(0, (num_valid - 400) // 160 + 1))
    assert alone.any(dim=-1).sum() == num_frames
    assert not alone[:, :, num_frames:].any()


@settings(deadline=None, max_examples=10)
@given(offset=st.floats(-0.5, 0.5), seed=st.integers(0, 99))
def test_a_constant_offset_of_the_waveform_does_not_matter(offset: float, seed: int) -> None:
    fbank = Fbank(SHORT, 16000)
    waveform_NS = random_clips(num_clips=1, num_samples=8000, seed=seed) / 32768
    num_valid_N = torch.tensor([8000])
    shifted = fbank(waveform_NS + offset, num_valid_N)
    # Rounding of the shifted waveform shows in the quietest bins.
    torch.testing.assert_close(shifted, fbank(waveform_NS, num_valid_N), atol=0.05, rtol=0)


def test_fbank_of_int16_and_of_float_are_the_same() -> None:
    clips_NS = random_clips(num_clips=2, num_samples=8000)
    num_valid_N = torch.tensor([8000, 5000])
    fbank = Fbank(SHORT, 16000)
    torch.testing.assert_close(fbank(clips_NS, num_valid_N), fbank(clips_NS / 32768, num_valid_N))


def test_fbank_stays_float32_under_autocast() -> None:
    clips_NS = random_clips(num_clips=1, num_samples=8000)
    fbank = Fbank(SHORT, 16000)
    expected = fbank(clips_NS, torch.tensor([8000]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fbank(clips_NS, torch.tensor([8000]))
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@given(width_uniform=UNIFORM, start_uniform=UNIFORM, size=st.integers(1, 1500), data=st.data())
def test_a_mask_is_one_bounded_span(width_uniform: float, start_uniform: float, size: int, data: st.DataObject) -> None:
    max_width = data.draw(st.integers(0, size))
    mask_S = span_mask(torch.tensor([width_uniform]), torch.tensor([start_uniform]), max_width, size)[0]
    assert mask_S.shape == (size,)
    masked = mask_S.nonzero().flatten().tolist()
    assert len(masked) == min(int(np.float32(width_uniform) * np.float32(max_width + 1)), max_width)
    assert masked == list(range(masked[0], masked[0] + len(masked))) if masked else True


def test_a_mask_reaches_both_ends_and_every_width() -> None:
    almost_one = torch.tensor(1.0).nextafter(torch.tensor(0.0))
    uniforms_N = torch.tensor([0.0, 0.3, almost_one])
    mask_NS = span_mask(uniforms_N, torch.tensor([0.5, 0.0, almost_one]), max_width=4, size=10)
    assert mask_NS.sum(dim=1).tolist() == [0, 1, 4]
    assert mask_NS[1].nonzero().flatten().tolist() == [0]
    assert mask_NS[2].nonzero().flatten().tolist() == [6, 7, 8, 9]


def test_specaugment_blanks_spans_of_its_clip_and_nothing_else() -> None:
    fbank = Fbank(SHORT, 16000)
    clips_NS = random_clips(num_clips=2, num_samples=12_000)
    num_valid_N = torch.tensor([12_000, 12_000])
    uniforms_N4 = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.5, 0.25, 0.75, 0.5]])
    plain = fbank(clips_NS, num_valid_N)
    masked = fbank(clips_NS, num_valid_N, uniforms_N4)
    assert torch.equal(masked[0], plain[0])
    # floor(0.5 * 33) = 16 bins from floor(0.25 * 113) = 28; floor(0.75 * 21) = 15 frames from floor(0.5 * 46) = 23
    blank_TF = torch.zeros(60, 128, dtype=torch.bool)
    blank_TF[:, 28:44] = True
    blank_TF[23:38] = True
    assert torch.equal(masked[1, 0], plain[1, 0].masked_fill(blank_TF, 0.0))
    alone = fbank(clips_NS[1:], num_valid_N[1:], uniforms_N4[1:])
    torch.testing.assert_close(alone[0], masked[1], atol=ATOL, rtol=0)


@pytest.mark.parametrize(
    ("name", "value"), [("freq_mask_bins", 129), ("time_mask_frames", 1001), ("std", 0.0), ("num_mel_bins", 0)]
)
def test_an_impossible_fbank_is_refused_by_its_key(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"fbank\.{name}"):
        FbankConfig(**{name: value})


def test_fbank_frames_below_a_sample_are_refused() -> None:
    with pytest.raises(UserError, match=r"fbank\.frame_shift_ms=0\.01 .* 16000 Hz"):
        Fbank(FbankConfig(frame_shift_ms=0.01), 16000)


@pytest.mark.parametrize("shape_hw", [(360, 480), (480, 360), (224, 224), (100, 180)])
def test_image_transform_equals_open_clips(shape_hw: tuple[int, int]) -> None:
    # A picture with smooth parts and hard edges.
    random = np.random.default_rng(0)
    height, width = shape_hw
    coarse = Image.fromarray(random.integers(0, 256, (9, 12, 3), np.uint8))
    picture = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))
    picture[height // 4 : height // 2, width // 3 : width // 2] = (255, 0, 128)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    found = ImageTransform(224, mean, std)(torch.from_numpy(picture)[None])[0]
    expected = image_transform(224, is_train=False, mean=mean, std=std)(Image.fromarray(picture))
    levels = (found - expected).abs() * 255 * torch.tensor(std)[:, None, None]
    assert found.dtype == torch.float32
    assert levels.max() < 2.01
    assert levels.mean() < 0.02
