"""Containers as PyAV opens them: seeking and time, for sound and picture alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import soundfile

from shards.reasons import MediaError

# Decoders need some packets before the first right sample, and containers index packets in decoding order,
# which runs ahead of the picture's by a few frames.
SEEK_MARGIN_SECONDS = 0.5


# What decoders raise on damaged files, besides errors of their own: wrong numbers end in Python's.
DECODER_ERRORS = (
    av.FFmpegError,
    soundfile.SoundFileError,
    OSError,
    ValueError,
    TypeError,
    RuntimeError,
    ArithmeticError,
    LookupError,
    MemoryError,
)


@contextmanager
def decoder_errors_are_unreadable() -> Iterator[None]:
    """Whatever a decoder raises inside becomes the reason ``unreadable``."""
    try:
        yield
    except DECODER_ERRORS:
        raise MediaError("unreadable") from None


def opened(path: Path) -> Any:
    """The container, to be closed by ``with``."""
    # Tags are not read, and those in Latin-1 would be an error.
    return av.open(str(path), metadata_errors="ignore")


def seek(container: Any, stream: Any, time_seconds: float) -> None:
    """Go to a place from which decoding gives everything at and after the time."""
    if time_seconds - SEEK_MARGIN_SECONDS > origin_seconds(container):
        container.seek(int((time_seconds - SEEK_MARGIN_SECONDS) / stream.time_base), stream=stream)


def origin_seconds(container: Any) -> float:
    """The container's own time at which its first stream starts."""
    return (container.start_time or 0) / av.time_base


def frame_seconds(frame: Any) -> float:
    """The container's own time of a frame."""
    if frame.time is None:
        raise MediaError("unreadable")
    return float(frame.time)
