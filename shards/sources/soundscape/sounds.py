"""The sound of a clip: a small synthesis function for each event and each background.

1. A ``Take`` says how high, how fast and how long to sound, and holds the common tools.
2. Each event and background is a function from a take to a waveform of any scale.
3. ``render_audio`` sets levels and lays the takes into their quarters over the background.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.sources.soundscape.world import CLIP_SECONDS, QUARTER_SECONDS, ClipScript

Waveform = NDArray[np.float64]

# Factors on a class's own pitch and rate, drawn uniformly: far enough apart to hear which one it is.
PITCH_FACTORS = {"low": (0.72, 0.80), "normal": (0.95, 1.05), "high": (1.25, 1.40)}
RATE_FACTORS = {"slow": (0.50, 0.65), "normal": (0.90, 1.10), "fast": (1.50, 1.80)}
EVENT_RMS = {"soft": 0.020, "normal": 0.045, "loud": 0.100}
LEVEL_JITTER_DB = 1.0
PEAK = 0.9
FADE_SECONDS = 0.02


@dataclass(frozen=True, kw_only=True)
class Take:
    """One performance. pitch, rate: factors on the class's own."""

    rng: np.random.Generator
    pitch: float
    rate: float
    seconds: float
    sample_rate_hz: int

    def times(self, seconds: float | None = None) -> Waveform:
        """Seconds from the start of each sample, of the whole take or of a part."""
        num_samples = round((seconds or self.seconds) * self.sample_rate_hz)
        return np.arange(num_samples) / self.sample_rate_hz

    def phase(self, frequency_hz: Waveform) -> Waveform:
        """Radians of an oscillator with this frequency at each sample; ``pitch`` is applied."""
        return np.cumsum(2 * np.pi * self.pitch / self.sample_rate_hz * frequency_hz)

    def noise(self, low_hz: float, high_hz: float, num_samples: int) -> Waveform:
        """Gaussian noise of unit RMS with a flat spectrum inside the band, nothing outside."""
        first, last = (int(hz * num_samples / self.sample_rate_hz) for hz in (low_hz, high_hz))
        spectrum = np.zeros(num_samples // 2 + 1, np.complex128)
        width = last + 1 - first
        spectrum[first : last + 1] = self.rng.standard_normal(2 * width).view(np.complex128)
        return np.fft.irfft(spectrum, num_samples) * (num_samples / (2 * math.sqrt(width)))

    def repeat(self, grain: Waveform, every_seconds: float) -> Waveform:
        """The grain again and again, ``rate`` times as often, with slightly uneven onsets and strengths."""
        gap_samples = every_seconds / self.rate * self.sample_rate_hz
        num_samples = round(self.seconds * self.sample_rate_hz)
        sound = np.zeros(num_samples + len(grain))
        for onset in np.arange(0, num_samples, gap_samples):
            start = int(onset + self.rng.uniform(0, 0.1) * gap_samples)
            sound[start : start + len(grain)] += self.rng.uniform(0.8, 1.0) * grain[: len(sound) - start]
        return sound[:num_samples]

    def wander(self, points_per_second: float) -> Waveform:
        """A slow random curve between 0 and 1, as long as the take."""
        knots = self.rng.uniform(0, 1, 2 + int(points_per_second * self.seconds))
        return np.interp(self.times() / self.seconds, np.linspace(0, 1, len(knots)), knots)


def _arch(times: Waveform) -> Waveform:
    arch: Waveform = np.sin(np.pi * times / times[-1])
    return arch


def _buzz(phase: Waveform, brightness: float) -> Waveform:
    """A periodic pulse with about sqrt(brightness) strong harmonics."""
    pulse: Waveform = np.exp(brightness * (np.cos(phase) - 1))
    return pulse - np.mean(pulse)


def _alarm(take: Take) -> Waveform:
    upper = np.floor(take.times() * 6 * take.rate) % 2
    beeps: Waveform = np.tanh(3 * np.sin(take.phase(950 + 450 * upper)))
    return beeps


def _bell(take: Take) -> Waveform:
    times = take.times(1.2)
    partials = ((0.5, 0.6), (1.0, 0.5), (1.19, 0.35), (1.5, 0.3), (2.0, 0.25), (2.74, 0.15))
    stroke = sum(np.sin(2 * np.pi * 520 * take.pitch * r * times) * np.exp(-times / s) for r, s in partials)
    return take.repeat(np.asarray(stroke), every_seconds=0.9)


def _bird(take: Take) -> Waveform:
    times = take.times(0.1)
    return take.repeat(np.sin(take.phase(2400 + 16000 * times)) * _arch(times), every_seconds=0.24)


def _cat(take: Take) -> Waveform:
    times = take.times(0.46)
    meow = _buzz(take.phase(480 + 260 * _arch(times)), 6)
    return take.repeat(meow * _arch(times), every_seconds=0.85)


def _clock(take: Take) -> Waveform:
    times = take.times(0.06)
    tick = np.sin(2 * np.pi * 2100 * take.pitch * times) * np.exp(-times / 0.01)
    return take.repeat(tick, every_seconds=0.35)


def _cricket(take: Take) -> Waveform:
    times = take.times(0.12)
    pulses = np.maximum(0, np.sin(2 * np.pi * 25 * times)) ** 2
    return take.repeat(np.sin(2 * np.pi * 4400 * take.pitch * times) * pulses, every_seconds=0.28)


def _dog(take: Take) -> Waveform:
    times = take.times(0.18)
    voice = _buzz(take.phase(230 + 260 * _arch(times)), 12)
    return take.repeat((voice + 0.12 * take.noise(400, 2500, len(times))) * _arch(times), every_seconds=0.5)


def _drill(take: Take) -> Waveform:
    times = take.times()
    bursts = 0.15 + (np.sin(2 * np.pi * 1.6 * take.rate * times) > -0.3)
    whir = np.sin(take.phase(np.full_like(times, 1500.0)))
    return bursts * (_buzz(take.phase(np.full_like(times, 130.0)), 150) + 0.15 * whir)


def _drops(take: Take) -> Waveform:
    times = take.times(0.08)
    drop = np.sin(take.phase(650 + 11000 * times)) * np.exp(-times / 0.025)
    return take.repeat(drop, every_seconds=0.33)


def _drum(take: Take) -> Waveform:
    times = take.times(0.3)
    beat = np.sin(take.phase(75 + 90 * np.exp(-times / 0.03))) * np.exp(-times / 0.09)
    return take.repeat(beat, every_seconds=0.42)


def _engine(take: Take) -> Waveform:
    times = take.times()
    throb = np.sin(2 * np.pi * 2.2 * take.rate * times)
    return (1 + 0.5 * throb) * _buzz(take.phase(62 + 8 * throb), 30)


def _frog(take: Take) -> Waveform:
    times = take.times(0.26)
    rattle = (0.5 + 0.5 * np.sin(2 * np.pi * 48 * times)) ** 3
    croak = np.sin(take.phase(np.full_like(times, 720.0))) + 0.5 * np.sin(take.phase(np.full_like(times, 1440.0)))
    return take.repeat(croak * rattle * _arch(times), every_seconds=0.5)


def _glass(take: Take) -> Waveform:
    times = take.times(0.45)
    crash = 0.4 * take.noise(1500, 7000, len(times)) * np.exp(-times / 0.02)
    for frequency_hz in take.rng.uniform(2000, 4800, 8):
        crash += np.sin(2 * np.pi * frequency_hz * take.pitch * times) * np.exp(-times / take.rng.uniform(0.03, 0.12))
    return take.repeat(crash, every_seconds=0.7)


def _horn(take: Take) -> Waveform:
    times = take.times(0.32)
    reeds = [_buzz(take.phase(np.full_like(times, hz)), 6) for hz in (350.0, 440.0)]
    return take.repeat(sum(reeds) * np.minimum(1, 20 * _arch(times)), every_seconds=0.62)


def _knock(take: Take) -> Waveform:
    times = take.times(0.1)
    thud = np.sin(2 * np.pi * 240 * take.pitch * times) + 0.4 * take.noise(150, 900, len(times))
    return take.repeat(thud * np.exp(-times / 0.018), every_seconds=0.26)


def _saw(take: Take) -> Waveform:
    strokes = np.sin(np.pi * take.times() * 2.4 * take.rate) ** 2
    return strokes * take.noise(900 * take.pitch, 3400 * take.pitch, len(strokes))


def _siren(take: Take) -> Waveform:
    sweep = np.arcsin(np.sin(2 * np.pi * 0.8 * take.rate * take.times())) * 2 / np.pi
    wail: Waveform = np.tanh(1.5 * np.sin(take.phase(850 + 330 * sweep)))
    return wail


def _whistle(take: Take) -> Waveform:
    times = take.times(0.34)
    blow = np.sin(take.phase(2500 + 60 * np.sin(2 * np.pi * 28 * times))) + 0.15 * take.noise(1800, 6000, len(times))
    return take.repeat(blow * np.minimum(1, 8 * _arch(times)), every_seconds=0.68)


def _crowd(take: Take) -> Waveform:
    num_samples = len(take.times())
    voices = ((200, 600), (400, 1100), (700, 2200))
    return np.asarray(sum(take.wander(5) ** 2 * take.noise(low, high, num_samples) for low, high in voices))


def _rain(take: Take) -> Waveform:
    return take.noise(1200, 7600, len(take.times()))


def _room(take: Take) -> Waveform:
    return 0.3 * take.noise(60, 5000, len(take.times()))


def _street(take: Take) -> Waveform:
    return (0.4 + take.wander(0.6)) * take.noise(40, 320, len(take.times()))


def _wind(take: Take) -> Waveform:
    num_samples = len(take.times())
    return take.wander(1.5) * take.noise(100, 500, num_samples) + take.wander(1.5) * take.noise(400, 1000, num_samples)


EVENT_SOUNDS: dict[str, Callable[[Take], Waveform]] = {
    "alarm": _alarm,
    "bell": _bell,
    "bird": _bird,
    "cat": _cat,
    "clock": _clock,
    "cricket": _cricket,
    "dog": _dog,
    "drill": _drill,
    "drops": _drops,
    "drum": _drum,
    "engine": _engine,
    "frog": _frog,
    "glass": _glass,
    "horn": _horn,
    "knock": _knock,
    "saw": _saw,
    "siren": _siren,
    "whistle": _whistle,
}
# Each with its RMS.
BACKGROUND_SOUNDS: dict[str, tuple[Callable[[Take], Waveform], float]] = {
    "crowd": (_crowd, 0.003),
    "rain": (_rain, 0.003),
    "room": (_room, 0.0006),
    "street": (_street, 0.003),
    "wind": (_wind, 0.003),
}


def render_audio(script: ClipScript, rng: np.random.Generator, sample_rate_hz: int) -> NDArray[np.int16]:
    """The sound of a clip.

    Returns:
        int16 [samples], exactly ``CLIP_SECONDS`` long.
    """
    synthesise, rms = BACKGROUND_SOUNDS[script.background]
    clip = _levelled(
        synthesise(Take(rng=rng, pitch=1, rate=1, seconds=CLIP_SECONDS, sample_rate_hz=sample_rate_hz)), rms, rng
    )
    for sound in script.sounds:
        pitch = rng.uniform(*PITCH_FACTORS[sound.pitch])
        rate = rng.uniform(*RATE_FACTORS[sound.rate])
        for quarter in sound.quarters:
            seconds = rng.uniform(0.85, 0.98) * QUARTER_SECONDS
            take = Take(rng=rng, pitch=pitch, rate=rate, seconds=seconds, sample_rate_hz=sample_rate_hz)
            event = _levelled(EVENT_SOUNDS[sound.event](take), EVENT_RMS[sound.loudness], rng)
            fade = np.minimum(1, take.times() / FADE_SECONDS)
            start_seconds = quarter * QUARTER_SECONDS + rng.uniform(0, QUARTER_SECONDS - seconds)
            start = int(start_seconds * sample_rate_hz)
            clip[start : start + len(event)] += event * fade * fade[::-1]
    return np.round(32767 * np.clip(clip, -1, 1)).astype(np.int16)


def _levelled(sound: Waveform, rms: float, rng: np.random.Generator) -> Waveform:
    """The waveform at about this RMS, its peaks kept below clipping."""
    level = rms * 10 ** (rng.uniform(-LEVEL_JITTER_DB, LEVEL_JITTER_DB) / 20)
    gain = float(min(level / np.sqrt(np.mean(sound**2)), PEAK / np.max(np.abs(sound))))
    return gain * sound
