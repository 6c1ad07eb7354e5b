"""One clip's media: a file becomes PCM16 FLAC bytes and JPEG frames.

1. Audio: the cut [start, end), one channel, band-limited resampling, 16 bit, FLAC. soundfile reads the
   containers it knows; PyAV reads the rest.
2. Picture: the frames on show at stated times, read in one pass that seeks over long gaps, shrunk, JPEG.
3. A clip that cannot be had fails with one short reason. Nothing is replaced by noise or silence.
"""

from __future__ import annotations

import errno
import io
import math
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import simplejpeg
import soundfile

from audiotext_dist.data.sample import ClipMetadata, Sample, safe_key
from audiotext_dist.errors import UserError
from shards.audio import read_audio, to_pcm16
from shards.container import decoder_errors_are_unreadable, frame_seconds, opened, origin_seconds, seek
from shards.reasons import MENDS, MediaError, Reason
from shards.record import Record

__all__ = ["MENDS", "MediaConfig", "MediaError", "Reason", "encode_clip", "frame_times", "read_frames", "try_clip"]

# Below this gap, decoding on is cheaper than seeking: encoders put keyframes 2 to 10 s apart.
LONG_GAP_SECONDS = 10.0
# The last frame is taken this long before the clip's end, where there still is a picture.
END_MARGIN_SECONDS = 0.01
# Four times an 8K frame: a header that promises more is damaged, or made to fill the memory.
MAX_FRAME_PIXELS = 1 << 27
MAX_JPEG_SIDE_PIXELS = 65500


@dataclass(frozen=True, kw_only=True)
class MediaConfig:
    """What a clip's media becomes.

    sample_rate_hz: of the FLAC. channel: which channel of many becomes the mono clip. num_frames: JPEGs a
    clip, evenly spaced from its start to its end (1: the middle). frame_times_seconds: the frames' times from
    the clip's start, in place of num_frames; one after its end takes its last picture. frame_short_side_pixels,
    frame_long_side_pixels: larger frames are shrunk to them; null sets no limit. jpeg_quality: 1 to 100.
    require_frames: false packs a clip without picture as well.
    """

    sample_rate_hz: int = 32000
    channel: Literal["first", "mean"] = "first"
    num_frames: int = 4
    frame_times_seconds: list[float] | None = None
    frame_short_side_pixels: int | None = 256
    frame_long_side_pixels: int | None = None
    jpeg_quality: int = 90
    require_frames: bool = True

    def __post_init__(self) -> None:
        if not 1000 <= self.sample_rate_hz <= 655350:
            raise UserError(f"sample_rate_hz={self.sample_rate_hz}: give 1000 to 655350, which FLAC can hold")
        if self.num_frames < 0:
            raise UserError(f"num_frames={self.num_frames} must be 0 or more")
        for name in ("frame_short_side_pixels", "frame_long_side_pixels"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be 1 or more, or null for no limit")
        times = self.frame_times_seconds
        if times is not None and (times != sorted(times) or not all(0 <= time < math.inf for time in times)):
            raise UserError(f"frame_times_seconds={list(times)}: give times of 0 or more in rising order")
        if not 1 <= self.jpeg_quality <= 100:
            raise UserError(f"jpeg_quality={self.jpeg_quality}: give 1 to 100")


def encode_clip(record: Record, config: MediaConfig, dataset: str) -> Sample:
    """Read, cut and encode one clip.

    Raises:
        MediaError: the clip's audio, or a picture that is required, cannot be had.
    """
    if record.excluded_by:
        raise MediaError("excluded")
    if record.media is None:
        raise MediaError("missing")
    path = Path(record.media)
    _check_file(path)
    start_seconds = max(0.0, record.start_seconds or 0.0)
    waveform, source_rate_hz = read_audio(path, start_seconds, record.end_seconds, config.channel)
    pcm = to_pcm16(waveform, source_rate_hz, config.sample_rate_hz)
    if pcm.size == 0:
        raise MediaError("empty")
    if not pcm.any():
        raise MediaError("silent")
    duration_seconds = pcm.size / config.sample_rate_hz
    times = frame_times(duration_seconds, config)
    try:
        frames = read_frames(path, [start_seconds + time for time in times], config) if times else []
    except MediaError as error:
        if config.require_frames or error.reason != "no_picture":
            raise
        frames, times = [], []
    flac = io.BytesIO()
    soundfile.write(flac, pcm, config.sample_rate_hz, format="FLAC", subtype="PCM_16")
    metadata = ClipMetadata(
        text=list(record.captions),
        recording=record.recording,
        dataset=dataset,
        labels=list(record.labels),
        start=start_seconds,
        duration=duration_seconds,
        sample_rate=config.sample_rate_hz,
        frame_times=times,
        name=record.name,
    )
    return Sample(key=safe_key(record.name), metadata=metadata, flac=flac.getvalue(), frames=frames)


def try_clip(record: Record, config: MediaConfig, dataset: str) -> Sample | Reason:
    """``encode_clip`` for worker processes: the sample, or the reason why there is none."""
    try:
        return encode_clip(record, config, dataset)
    except MediaError as error:
        return error.reason


def _check_file(path: Path) -> None:
    """Refuse what is no file of some length: opening a named pipe would wait for ever."""
    try:
        facts = path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name with a NUL
        raise MediaError("missing") from None
    except OSError as error:  # a name too long for the disk; not permitted, a circle of links
        raise MediaError("missing" if error.errno == errno.ENAMETOOLONG else "unreadable") from None
    if not stat.S_ISREG(facts.st_mode):
        raise MediaError("unreadable")
    if facts.st_size == 0:
        raise MediaError("empty")


def frame_times(duration_seconds: float, config: MediaConfig) -> list[float]:
    """Seconds from the clip's start: those asked for, or ``i * duration / (num_frames - 1)``; none after its end."""
    wanted = config.frame_times_seconds
    if wanted is None and config.num_frames == 1:
        return [round(duration_seconds / 2, 3)]
    if wanted is None:
        wanted = [i * duration_seconds / (config.num_frames - 1) for i in range(config.num_frames)]
    latest = max(0.0, duration_seconds - END_MARGIN_SECONDS)
    return [round(min(time, latest), 3) for time in wanted]


def read_frames(path: Path, times_seconds: list[float], config: MediaConfig) -> list[bytes]:
    """The frame on show at each time (ascending, seconds from the file's start), as JPEG bytes.

    Raises:
        MediaError: ``no_picture`` (a cover image is none) or ``unreadable``.
    """
    with decoder_errors_are_unreadable(), opened(path) as container:
        pictures = [
            stream for stream in container.streams.video if not stream.disposition & av.stream.Disposition.attached_pic
        ]
        if not pictures:
            raise MediaError("no_picture")
        if pictures[0].width * pictures[0].height > MAX_FRAME_PIXELS:
            raise MediaError("unreadable")
        origin = origin_seconds(container)
        shown = _frames_at(container, pictures[0], [origin + time for time in times_seconds])
        return [_to_jpeg(frame, pictures[0].sample_aspect_ratio, config) for frame in shown]


def _frames_at(container: Any, stream: Any, times_seconds: list[float]) -> Iterator[Any]:
    """For each time the last frame that starts at or before it (the first of all, if none does)."""
    shown = ahead = None
    decoder: Iterator[Any] = iter(())
    for time in times_seconds:
        if shown is None or (ahead is not None and time - frame_seconds(ahead) > LONG_GAP_SECONDS):
            seek(container, stream, time)
            decoder = container.decode(stream)
            shown, ahead = None, next(decoder, None)
        while ahead is not None and (shown is None or frame_seconds(ahead) <= time):
            shown, ahead = ahead, next(decoder, None)
        if shown is None:
            raise MediaError("no_picture")
        yield shown


def _to_jpeg(frame: Any, pixel_aspect: Any, config: MediaConfig) -> bytes:
    width, height = frame.width * float(pixel_aspect or 1), frame.height
    scale = min(
        1.0,
        (config.frame_short_side_pixels or math.inf) / min(width, height),
        (config.frame_long_side_pixels or math.inf) / max(width, height),
    )
    if max(width, height) * scale > MAX_JPEG_SIDE_PIXELS:
        raise MediaError("unreadable")
    rgb = frame.to_ndarray(
        format="rgb24",
        width=max(1, round(width * scale)),
        height=max(1, round(height * scale)),
        interpolation="BICUBIC",
    )
    # Phones film sideways and say so; both count anticlockwise.
    upright = np.ascontiguousarray(np.rot90(rgb, round(frame.rotation / 90)))
    return bytes(simplejpeg.encode_jpeg(upright, quality=config.jpeg_quality, colorsubsampling="420"))
