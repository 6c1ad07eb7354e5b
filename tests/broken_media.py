"""Media files that are damaged, odd or not media at all, each with the one outcome that a build must state.

``Case.write`` gets a path without suffix in an empty folder and returns the path it made.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import simplejpeg
import soundfile

from tests.media_files import noise, sweep, write_video

RATE_HZ = 16000
SECONDS = 2.0


@dataclass(frozen=True)
class Case:
    """outcome: ``written`` or the reason. cut: start and end in seconds. num_frames: pictures asked for."""

    name: str
    outcome: str
    write: Callable[[Path], Path]
    num_frames: int = 0
    cut: tuple[float | None, float | None] = (None, None)
    seconds: float | None = field(default=None)


def sound(path: Path, suffix: str) -> Path:
    """Two seconds of a rising tone."""
    path = path.with_suffix(f".{suffix}")
    soundfile.write(path, sweep(SECONDS, RATE_HZ), RATE_HZ)
    return path


def wav(path: Path) -> Path:
    return sound(path, "wav")


def flac(path: Path) -> Path:
    return sound(path, "flac")


def ogg(path: Path) -> Path:
    """Noise, of which two seconds fill several pages."""
    path = path.with_suffix(".ogg")
    soundfile.write(path, noise(round(SECONDS * 48000)), 48000)
    return path


def mp3(path: Path) -> Path:
    return sound(path, "mp3")


def film(path: Path, suffix: str = "mp4", audio_seconds: float = SECONDS, **options: Any) -> Path:
    """Two seconds of picture and, unless they are 0, some of sound."""
    path = path.with_suffix(f".{suffix}")
    audio = sweep(audio_seconds, 48000) if audio_seconds else None
    write_video(path, SECONDS, audio=audio, rate_hz=48000, **options)
    return path


def of_bytes(content: bytes, suffix: str = "wav") -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        path = path.with_suffix(f".{suffix}")
        path.write_bytes(content)
        return path

    return write


def cut(write: Callable[[Path], Path], share: float = 0.6) -> Callable[[Path], Path]:
    """Only this share of the file's bytes."""

    def write_part(path: Path) -> Path:
        path = write(path)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
        return path

    return write_part


def patched(write: Callable[[Path], Path], change: Callable[[bytearray], None]) -> Callable[[Path], Path]:
    def write_changed(path: Path) -> Path:
        path = write(path)
        content = bytearray(path.read_bytes())
        change(content)
        path.write_bytes(content)
        return path

    return write_changed


def faststart(path: Path) -> Path:
    """An mp4 whose table of contents comes first, so that a download cut short opens."""
    return film(path, container_options={"movflags": "faststart"})


def wav_says(num_bytes: int) -> Callable[[bytearray], None]:
    def change(content: bytearray) -> None:
        at = content.index(b"data") + 4
        content[at : at + 4] = struct.pack("<I", num_bytes)
        content[4:8] = struct.pack("<I", min(num_bytes + 36, 0xFFFFFFFF))

    return change


def flac_says(num_samples: int) -> Callable[[bytearray], None]:
    def change(content: bytearray) -> None:
        # STREAMINFO begins at byte 8; its last 36 bits before the MD5 are the number of samples.
        content[21] = content[21] & 0xF0 | num_samples >> 32
        content[22:26] = struct.pack(">I", num_samples & 0xFFFFFFFF)

    return change


def garbage_in_the_middle(content: bytearray) -> None:
    middle = len(content) // 2
    content[middle : middle + 4000] = np.random.default_rng(0).bytes(min(4000, len(content) - middle))


def _jpeg(width: int, height: int) -> bytes:
    """16 x 16 pixels whose header says another size."""
    jpeg = bytearray(simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8)))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(jpeg)


def bomb(path: Path) -> Path:
    """Sound, and a picture track whose only frame says that it is 60,000 x 60,000."""
    return _with_picture_track(path.with_suffix(".mkv"), _jpeg(60000, 60000), cover=False)


def cover_only(path: Path) -> Path:
    return _with_picture_track(path.with_suffix(".mp4"), _jpeg(16, 16), cover=True)


def _with_picture_track(path: Path, jpeg: bytes, *, cover: bool) -> Path:
    with av.open(str(path), "w") as container:
        audio: Any = container.add_stream("aac", rate=RATE_HZ, layout="mono")
        video: Any = container.add_stream("mjpeg", rate=1)
        video.width, video.height, video.pix_fmt = 16, 16, "yuvj420p"
        if cover:
            video.disposition = av.stream.Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(noise(RATE_HZ).T, format="s16", layout="mono")
        frame.sample_rate = RATE_HZ
        container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
        packet = av.Packet(jpeg)
        packet.stream, packet.pts, packet.dts = video, 0, 0
        container.mux(packet)
    return path


def samples(values: np.ndarray, subtype: str = "PCM_16") -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        path = path.with_suffix(".wav")
        soundfile.write(path, values, RATE_HZ, subtype=subtype)
        return path

    return write


def early(path: Path) -> Path:
    """A Matroska file whose timestamps begin before zero, as some recorders write."""
    path = path.with_suffix(".mkv")
    with av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as container:
        stream: Any = container.add_stream("pcm_s16le", rate=RATE_HZ, layout="mono")
        for start in range(-8000, 24000, 1600):
            frame = av.AudioFrame.from_ndarray(noise(1600).T, format="s16", layout="mono")
            frame.sample_rate, frame.pts = RATE_HZ, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def mp3_in_wav(path: Path) -> Path:
    with av.open(str(path.with_suffix(".wav")), "w") as container:
        stream: Any = container.add_stream("mp3", rate=RATE_HZ, layout="mono")
        frame = av.AudioFrame.from_ndarray(sweep(SECONDS, RATE_HZ).T, format="s16p", layout="mono")
        frame.sample_rate = RATE_HZ
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path.with_suffix(".wav")


def mp3_without_length(path: Path) -> Path:
    """Half silence, half noise: its bit rate varies, and no header says how long it is."""
    path = path.with_suffix(".mp3")
    variable_rate = {"flags": "+qscale", "global_quality": "472"}
    pcm = np.concatenate([np.zeros((10 * 48000, 1), np.int16), noise(10 * 48000)])
    with av.open(str(path), "w", options={"write_xing": "0"}) as container:
        stream: Any = container.add_stream("mp3", rate=48000, layout="mono", options=variable_rate)
        frame = av.AudioFrame.from_ndarray(pcm.T, format="s16p", layout="mono")
        frame.sample_rate = 48000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def flac_from_a_pipe(path: Path) -> Path:
    """Its header does not know how long it is."""
    return patched(flac, flac_says(0))(path)


def renamed(write: Callable[[Path], Path], suffix: str) -> Callable[[Path], Path]:
    def write_renamed(path: Path) -> Path:
        return write(path).rename(path.with_suffix(f".{suffix}"))

    return write_renamed


def folder(path: Path) -> Path:
    path.with_suffix(".wav").mkdir()
    return path.with_suffix(".wav")


def named_pipe(path: Path) -> Path:
    os.mkfifo(path.with_suffix(".wav"))
    return path.with_suffix(".wav")


def link_to(target: str) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        path = path.with_suffix(".wav")
        path.symlink_to(path.with_name(target) if target else path)
        return path

    return write


def path_named(name: str) -> Callable[[Path], Path]:
    return lambda path: path.with_name(name)


def wav_of(subtype: str, channels: int = 1) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        path = path.with_suffix(".wav")
        soundfile.write(path, np.repeat(sweep(SECONDS, RATE_HZ), channels, axis=1), RATE_HZ, subtype=subtype)
        return path

    return write


def webm(path: Path) -> Path:
    return film(path, "webm", video_codec="libvpx", audio_codec="libopus")


def mkv(path: Path) -> Path:
    return film(path, "mkv")


ONE_SAMPLE = np.full((1, 1), 1000, np.int16)
NOT_FINITE = np.full(800, np.nan, np.float32)
THREE_HOURS_BYTES = 3 * 3600 * RATE_HZ * 2

CASES = [
    Case("empty file", "empty", of_bytes(b"")),
    Case("text named wav", "unreadable", of_bytes(b"<html>429 Too Many Requests</html>")),
    Case("text named mp4", "unreadable", of_bytes(b"<html>gone</html>" * 100, "mp4")),
    Case("random bytes", "unreadable", of_bytes(np.random.default_rng(0).bytes(5000), "mp4")),
    Case("4 bytes", "unreadable", of_bytes(b"RIFF")),
    Case("wav cut", "truncated", cut(wav)),
    Case("24-bit wav cut", "truncated", cut(wav_of("PCM_24"))),
    Case("flac cut", "truncated", cut(flac)),
    Case("ogg cut", "truncated", cut(ogg)),
    Case("mp3 cut", "truncated", cut(mp3)),
    Case("mp4 without its table", "unreadable", cut(film)),
    Case("mp4 with its table, cut", "truncated", cut(faststart)),
    Case("mkv cut", "truncated", cut(mkv)),
    Case("webm cut", "truncated", cut(webm)),
    Case("cut before the place where a wav ends", "written", cut(wav), cut=(0.0, 1.0), seconds=1.0),
    Case("cut across the place where a wav ends", "truncated", cut(wav), cut=(0.5, 1.5)),
    Case("wav header only", "truncated", cut(wav, 44.5 / 64044)),
    Case("wav that says three hours", "truncated", patched(wav, wav_says(THREE_HOURS_BYTES))),
    Case("wav from a pipe, length unknown", "written", patched(wav, wav_says(0xFFFFFFFF)), seconds=SECONDS),
    Case(
        "flac that says 1,000 hours",
        "truncated",
        patched(flac, flac_says(3600000 * RATE_HZ)),
    ),
    Case("flac with garbage inside", "unreadable", patched(flac, garbage_in_the_middle)),
    Case("mp4 with garbage inside", "unreadable", patched(film, garbage_in_the_middle)),
    Case("no sound track", "no_audio", lambda path: film(path, audio_seconds=0)),
    Case("no picture track", "no_picture", wav, num_frames=2),
    Case("cover image only", "no_picture", cover_only, num_frames=2),
    Case("a picture named mp4", "no_audio", of_bytes(_jpeg(16, 16), "mp4"), num_frames=2),
    Case("a huge picture named mp4", "no_audio", of_bytes(_jpeg(65000, 65000), "mp4"), num_frames=2),
    Case("a film whose header says 60,000 x 60,000", "unreadable", bomb, num_frames=2),
    Case("zero-length sound", "empty", samples(np.zeros((0, 1), np.int16))),
    Case("all zeros", "silent", samples(np.zeros(8000, np.int16))),
    Case("not a number", "unreadable", samples(NOT_FINITE, "FLOAT")),
    Case("one sample", "written", samples(ONE_SAMPLE), seconds=1 / RATE_HZ),
    Case("cut after the end", "empty", wav, cut=(5.0, 6.0)),
    Case("cut over the end", "written", wav, cut=(1.5, 6.0), seconds=0.5),
    Case("cut reversed", "empty", wav, cut=(1.5, 0.5)),
    Case("cut before the start", "written", wav, cut=(-1.0, 0.5), seconds=0.5),
    Case("timestamps below zero", "written", early),
    Case("picture shorter than sound", "written", lambda path: film(path, audio_seconds=4.0), num_frames=4),
    Case("sound shorter than picture", "written", lambda path: film(path, audio_seconds=1.0), num_frames=2),
    Case("mp3 in wav", "written", mp3_in_wav),
    Case("flac named mp3", "written", renamed(flac, "mp3"), seconds=SECONDS),
    Case("mp4 named wav", "written", renamed(film, "wav"), num_frames=2),
    Case("wav named raw", "written", renamed(wav, "raw"), seconds=SECONDS),
    Case("flac from a pipe, length unknown", "written", flac_from_a_pipe, seconds=SECONDS),
    Case("end of an mp3 of unknown length", "written", mp3_without_length, cut=(18.0, 19.0), seconds=1.0),
    Case("8-bit wav", "written", wav_of("PCM_U8"), seconds=SECONDS),
    Case("24-bit wav", "written", wav_of("PCM_24"), seconds=SECONDS),
    Case("32-bit wav", "written", wav_of("PCM_32"), seconds=SECONDS),
    Case("float wav", "written", wav_of("FLOAT"), seconds=SECONDS),
    Case("double wav", "written", wav_of("DOUBLE"), seconds=SECONDS),
    Case("5.1 channels", "written", wav_of("PCM_16", channels=6), seconds=SECONDS),
    Case("a folder", "unreadable", folder),
    Case("a named pipe", "unreadable", named_pipe),
    Case("a link to itself", "unreadable", link_to("")),
    Case("a link to nothing", "missing", link_to("nothing")),
    Case("a name of 300 characters", "missing", path_named("x" * 300)),
    Case("a name with a NUL", "missing", path_named("a\0b.wav")),
]
