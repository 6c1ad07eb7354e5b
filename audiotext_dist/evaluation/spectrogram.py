"""Spectrograms for people: what a clip sounds like, at a glance. No tower reads these."""

from __future__ import annotations

import io
import itertools

import matplotlib
import numpy as np
import soundfile
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

WINDOW_SECONDS = 0.032
LOWEST_HZ = 50.0
RANGE_DB = 80.0
_MAX_WINDOWS_A_COLUMN = 16
_MARKED_KHZ = (0.5, 2.0, 8.0)
_INK, _PAPER = (60, 60, 60), (255, 255, 255)


def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """A face that knows most alphabets; it comes with matplotlib."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}", size)


def read_flac(flac: bytes, seconds: float) -> NDArray[np.float32]:
    """The first seconds of a clip, mono in [-1, 1].

    Raises:
        soundfile.LibsndfileError: it does not decode.
    """
    with soundfile.SoundFile(io.BytesIO(flac)) as file:
        found_SC = file.read(round(seconds * file.samplerate), dtype="float32", always_2d=True)
        first_S: NDArray[np.float32] = found_SC[:, 0]
        return first_S


def spectrogram(waveform_S: NDArray[np.float32], sample_rate_hz: int, width: int, height: int) -> Image.Image:
    """Power on a mel axis up to Nyquist, the loudest 80 dB, time from left to right; RGB [height, width]."""
    window = round(WINDOW_SECONDS * sample_rate_hz)
    padded_S = np.pad(waveform_S, (0, max(window - len(waveform_S), 0)))
    # As many windows as there are columns, or several times that where they would leave gaps between them.
    num_columns = width * min(_MAX_WINDOWS_A_COLUMN, max(1, round(len(padded_S) / (width * window))))
    starts = np.linspace(0, len(padded_S) - window, num_columns).astype(int)
    frames_TW = padded_S[starts[:, None] + np.arange(window)] * np.hanning(window).astype(np.float32)
    power_TK = np.abs(np.fft.rfft(frames_TW)) ** 2
    power_TK = power_TK.reshape(width, -1, power_TK.shape[1]).mean(axis=1)
    edge_hz = _hz(np.linspace(_mel(LOWEST_HZ), _mel(sample_rate_hz / 2), height + 1))
    edges = np.searchsorted(np.fft.rfftfreq(window, 1 / sample_rate_hz), edge_hz).tolist()
    # A row narrower than a bin shows the bin that it lies in.
    rows_HT = np.stack(
        [
            power_TK[:, min(low, power_TK.shape[1] - 1) : max(high, low + 1)].max(axis=1)
            for low, high in itertools.pairwise(edges)
        ]
    )
    level_HT = 10 * np.log10(rows_HT / max(float(rows_HT.max()), 1e-10) + 1e-10)
    shade_HT = np.clip(1 + level_HT / RANGE_DB, 0, 1)[::-1]
    return Image.fromarray((matplotlib.colormaps["magma"](shade_HT)[..., :3] * 255).astype(np.uint8))


def spectrogram_with_axes(
    waveform_S: NDArray[np.float32], sample_rate_hz: int, width: int, height: int, *, text_size: int = 10
) -> Image.Image:
    """The same with time in s below and frequency in kHz at the left, all within width and height."""
    face = font(text_size)
    left, below = round(4.2 * text_size), round(1.5 * text_size)
    inner_width, inner_height = width - left - text_size, height - below - text_size // 2
    picture = Image.new("RGB", (width, height), _PAPER)
    top = text_size // 2
    picture.paste(spectrogram(waveform_S, sample_rate_hz, inner_width, inner_height), (left, top))
    draw = ImageDraw.Draw(picture)
    nyquist, lowest = _mel(sample_rate_hz / 2), _mel(LOWEST_HZ)
    top_khz = sample_rate_hz / 2000
    # Those far enough below the top to be read.
    for khz in [*(khz for khz in _MARKED_KHZ if khz < 0.7 * top_khz), top_khz]:
        y = top + inner_height * (1 - (_mel(1000 * khz) - lowest) / (nyquist - lowest))
        draw.line([(left - 3, y), (left, y)], fill=_INK)
        label = f"{khz:g} kHz" if khz == top_khz else f"{khz:g}"
        draw.text((left - 5, y), label, font=face, fill=_INK, anchor="rm")
    seconds = len(waveform_S) / sample_rate_hz
    for share in (0, 0.5, 1):
        x, y = left + share * (inner_width - 1), top + inner_height
        draw.line([(x, y), (x, y + 3)], fill=_INK)
        label = f"{share * seconds:.3g}" + (" s" if share == 1 else "")
        draw.text((x, y + 3), label, font=face, fill=_INK, anchor="ra" if share == 1 else "ma")
    return picture


def _mel(hz: float) -> float:
    return float(1127.0 * np.log1p(hz / 700.0))


def _hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    hz: NDArray[np.float64] = 700.0 * np.expm1(mel / 1127.0)
    return hz
