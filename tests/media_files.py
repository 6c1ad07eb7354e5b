"""Small media files whose content says where in the file it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

FRAMES_PER_SECOND = 25


def noise(num_samples: int, num_channels: int = 1, seed: int = 0) -> NDArray[np.int16]:
    """White noise, int16 [num_samples, num_channels]."""
    generator = np.random.default_rng(seed)
    return generator.integers(-8000, 8000, (num_samples, num_channels), dtype=np.int16)


def sweep(seconds: float, rate_hz: int) -> NDArray[np.int16]:
    """A tone that rises from 100 Hz to 2 kHz, int16 [num_samples, 1]: no two moments are alike."""
    times = np.arange(round(seconds * rate_hz)) / rate_hz
    phase = 2 * np.pi * (100 * times + (1900 / seconds) * times**2 / 2)
    return np.rint(12000 * np.sin(phase)).astype(np.int16)[:, None]


def write_video(
    path: Path,
    seconds: float,
    *,
    audio: NDArray[np.int16] | None = None,
    rate_hz: int = 16000,
    width: int = 64,
    height: int = 48,
    audio_codec: str = "aac",
    video_codec: str = "libx264",
    container_options: dict[str, str] | None = None,
    corner: bool = False,
    **video_options: str,
) -> None:
    """A film whose picture n is ``grey_of(n)`` all over, with a mono track where one is given.

    video_codec: H.264, the default, gets B-frames. corner: the picture's upper left is white.
    """
    frame_order = {"bf": "2"} if video_codec == "libx264" else {}
    with av.open(str(path), "w", options=container_options or {}) as container:
        video: Any = container.add_stream(video_codec, rate=FRAMES_PER_SECOND, options={**frame_order, **video_options})
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        sound: Any = None
        if audio is not None:
            sound = container.add_stream(audio_codec, rate=rate_hz)
            sound.layout = "mono"
            frame = av.AudioFrame.from_ndarray(audio.T, format="s16", layout="mono")
            frame.sample_rate = rate_hz
            container.mux(sound.encode(frame))
            container.mux(sound.encode(None))
        for number in range(round(seconds * FRAMES_PER_SECOND)):
            picture = np.full((height, width, 3), grey_of(number), np.uint8)
            if corner:
                picture[: height // 2, : width // 2] = 255
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode(None))


def grey_of(frame_number: int) -> int:
    """Neighbouring frames differ by 37 of 200 grey levels."""
    return 30 + frame_number * 37 % 200
