"""The sound of a media file.

1. soundfile reads the containers it knows; PyAV reads the rest.
2. Only the cut [start, end) and what a decoder needs before it is decoded.
3. A file that ends before its own header says, inside the cut, is truncated: no shorter clip is made of it.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from shards.container import (
    SEEK_MARGIN_SECONDS,
    decoder_errors_are_unreadable,
    frame_seconds,
    opened,
    origin_seconds,
    seek,
)
from shards.reasons import MediaError

# What is asked of libsndfile at once: a header that promises hours costs no memory.
BLOCK_SAMPLES = 1 << 20
# Containers round the ends of their streams to packets.
CONTAINER_TOLERANCE_SECONDS = 0.25
# Writers to pipes, who cannot know the length, give the largest number or one near it.
UNKNOWN_WAV_BYTES = 0x7FFFF000
# libsndfile's word for a FLAC that does not say how long it is: those from pipes.
UNKNOWN_SAMPLES = 1 << 62
# FFmpeg seeks in these by the mean bit rate, which is wrong where the rate varies: they are read from the start.
UNSEEKABLE_FORMATS = ("mp3", "aac")
# MPEG headers count whole frames, and decoders drop some for the codec's delay.
MPEG_TOLERANCE_SAMPLES = 2 * 1152


def read_audio(
    path: Path, start_seconds: float, end_seconds: float | None, channel: Literal["first", "mean"]
) -> tuple[NDArray[np.float32], int]:
    """The samples in [start, end), or up to the file's end if that comes first.

    Returns:
        The waveform, float32 [num_samples] with full scale at 1, and its rate in Hz.

    Raises:
        MediaError: ``unreadable``, ``truncated`` or ``no_audio``.
    """
    with decoder_errors_are_unreadable():
        try:
            file = soundfile.SoundFile(str(path))
        # TypeError: soundfile asks for more facts where a file's suffix is that of raw samples.
        except (soundfile.LibsndfileError, TypeError):
            file = None
        if file is None or not _says_its_length(file, path):
            channels, rate_hz = _read_with_pyav(path, start_seconds, end_seconds)
        else:
            # What libsndfile opens but cannot read is damaged, and PyAV would skip the damage and say nothing.
            channels, rate_hz = _read_with_soundfile(file, path, start_seconds, end_seconds)
    if not np.isfinite(channels).all():
        raise MediaError("unreadable")
    return (channels[0] if channel == "first" else channels.mean(axis=0)), rate_hz


def to_pcm16(waveform: NDArray[np.float32], source_rate_hz: int, target_rate_hz: int) -> NDArray[np.int16]:
    """Resample [num_samples] and round to 16 bit; a 16-bit source at the target rate is kept exactly."""
    if source_rate_hz != target_rate_hz and waveform.size:
        waveform = soxr.resample(waveform, source_rate_hz, target_rate_hz)
    pcm: NDArray[np.int16] = np.clip(np.rint(waveform * 32768.0), -32768, 32767).astype(np.int16)
    return pcm


def _read_with_soundfile(
    file: soundfile.SoundFile, path: Path, start_seconds: float, end_seconds: float | None
) -> tuple[NDArray[np.float32], int]:
    with file:
        rate_hz = int(file.samplerate)
        first = min(round(start_seconds * rate_hz), file.frames)
        last = file.frames if end_seconds is None else max(first, round(end_seconds * rate_hz))
        # Seeking in Ogg can be wrong by some samples: it is read from its start.
        lead = first if file.format == "OGG" else min(first, round(SEEK_MARGIN_SECONDS * rate_hz))
        file.seek(first - lead)
        wanted = last - first + lead
        try:
            samples = _read_blocks(file, wanted)
        except soundfile.LibsndfileError:
            # libsndfile loses its way alike where a FLAC is damaged and where it ends too early.
            is_cut = file.format == "FLAC" and _packets_end_before(path, file.frames)
            raise MediaError("truncated" if is_cut else "unreadable") from None
        promised = min(wanted, file.frames - first + lead)
        tolerance = MPEG_TOLERANCE_SAMPLES if file.subtype.startswith("MPEG") else 0
        cut_short = len(samples) + tolerance < promised
        at_the_end = len(samples) < wanted or last >= file.frames
        if cut_short or (at_the_end and (_is_cut_wav(path) or _is_cut_ogg(path))):
            raise MediaError("truncated")
        return samples[lead:].T, rate_hz


def _read_blocks(file: soundfile.SoundFile, num_samples: int) -> NDArray[np.float32]:
    """Up to ``num_samples`` from where the file stands, float32 [found, channels]."""
    blocks = [np.zeros((0, file.channels), np.float32)]
    while num_samples > 0:
        block = file.read(min(num_samples, BLOCK_SAMPLES), dtype="float32", always_2d=True)
        if not len(block):
            break
        blocks.append(block)
        num_samples -= len(block)
    return np.concatenate(blocks)


def _says_its_length(file: soundfile.SoundFile, path: Path) -> bool:
    """False for a FLAC from a pipe, and for an MP3 whose first frame is no Xing, Info or VBRI one.

    libsndfile guesses the length of such an MP3, and stops where it guessed.
    """
    if file.format != "MP3":
        return bool(file.frames < UNKNOWN_SAMPLES)
    return _has_xing_frame(path)


def _has_xing_frame(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(10)
        if head[:3] == b"ID3":
            # The tag's size: four times seven bits.
            file.seek(10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True)))
            head = b""
        frame = head + file.read(256)
    return any(mark in frame for mark in (b"Xing", b"Info", b"VBRI"))


def _is_cut_wav(path: Path) -> bool:
    """True if a WAV's sample chunk is longer than the file, of which libsndfile says nothing."""
    with path.open("rb") as file:
        if file.read(4) != b"RIFF" or file.read(8)[4:] != b"WAVE":
            return False
        while len(header := file.read(8)) == 8:
            name, num_bytes = struct.unpack("<4sI", header)
            if name == b"data":
                return bool(file.tell() + num_bytes > path.stat().st_size and num_bytes < UNKNOWN_WAV_BYTES)
            file.seek(num_bytes + num_bytes % 2, 1)
    return False


def _is_cut_ogg(path: Path) -> bool:
    """True if an Ogg file ends inside a page; libsndfile takes the page before for the last."""
    with path.open("rb") as file:
        if file.read(4) != b"OggS":
            return False
        # A page has 65,307 bytes at most.
        file.seek(max(0, path.stat().st_size - 65307))
        tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    return len(page) < 27 or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]])


def _packets_end_before(path: Path, num_samples: int) -> bool:
    """True if whole packets, none damaged (those have no time), make up less sound."""
    with opened(path) as container:
        stream = container.streams.audio[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        if any(packet.pts is None for packet in packets):
            return False
        end = max((packet.pts + (packet.duration or 0) for packet in packets), default=0)
        return bool(end * stream.time_base * stream.rate < num_samples)


def _read_with_pyav(path: Path, start_seconds: float, end_seconds: float | None) -> tuple[NDArray[np.float32], int]:
    with opened(path) as container:
        if not container.streams.audio:
            raise MediaError("no_audio")
        stream = container.streams.audio[0]
        rate_hz = int(stream.rate)
        origin = origin_seconds(container)
        if container.format.name not in UNSEEKABLE_FORMATS:
            seek(container, stream, origin + start_seconds)
        to_planes = av.AudioResampler(format="fltp")
        pieces: list[NDArray[Any]] = []
        first, position = 0, 0
        wanted = round(start_seconds * rate_hz)
        last = None if end_seconds is None else round(end_seconds * rate_hz)
        latest_seconds = 0.0
        for packet in container.demux():
            if packet.pts is not None:
                latest_seconds = max(latest_seconds, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream.index != stream.index:
                continue
            if packet.is_corrupt:
                raise MediaError("truncated")
            for frame in packet.decode():
                if not pieces:
                    # Only the first timestamp is used: those of some containers are rounded to milliseconds.
                    first = position = round((frame_seconds(frame) - origin) * rate_hz)
                pieces += [piece.to_ndarray() for piece in to_planes.resample(frame)]
                position += frame.samples
            if last is not None and position >= last:
                break
        else:
            _check_end(container, latest_seconds - origin)
        if not pieces:
            return np.zeros((1, 0), np.float32), rate_hz
        channels = np.concatenate(pieces, axis=1)
        return channels[:, max(0, wanted - first) : max(0, (position if last is None else last) - first)], rate_hz


def _check_end(container: Any, found_seconds: float) -> None:
    """Raise ``truncated`` if the packets of all streams end before the header says."""
    # Of other containers FFmpeg guesses the duration from the bit rate.
    claims = container.format.name.partition(",")[0] in ("mov", "matroska", "avi", "flv", "asf")
    if (
        claims
        and container.duration
        and found_seconds + CONTAINER_TOLERANCE_SECONDS < container.duration / av.time_base
    ):
        raise MediaError("truncated")
