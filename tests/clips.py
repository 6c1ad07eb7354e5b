"""Small real clips in real shards, for tests."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import simplejpeg
import soundfile

from audiotext_dist.data.sample import ClipMetadata, Sample
from shards.writer import commit, shard_name, write_tar

SAMPLE_RATE_HZ = 8000
FRAME_PIXELS = 16


def make_sample(
    number: int,
    *,
    seconds: float = 1.0,
    num_frames: int = 4,
    captions: Sequence[str] | None = None,
    labels: Sequence[str] = (),
    sample_rate_hz: int = SAMPLE_RATE_HZ,
) -> Sample:
    """A tone of its own pitch, frames of its own grey, captions of its own number."""
    time = np.arange(round(seconds * sample_rate_hz)) / sample_rate_hz
    tone = (8000 * np.sin(2 * np.pi * (200 + 37 * number) * time)).astype(np.int16)
    flac = io.BytesIO()
    soundfile.write(flac, tone, sample_rate_hz, format="FLAC", subtype="PCM_16")
    greys = [np.full((FRAME_PIXELS, FRAME_PIXELS, 3), 40 * frame + number, np.uint8) for frame in range(num_frames)]
    return Sample(
        key=f"clip-{number:04d}",
        metadata=ClipMetadata(
            text=[f"sound {number}", f"tone number {number}"] if captions is None else list(captions),
            recording=f"test:{number}",
            dataset="test",
            labels=list(labels),
            duration=seconds,
            sample_rate=sample_rate_hz,
        ),
        flac=flac.getvalue(),
        frames=[simplejpeg.encode_jpeg(grey, quality=95) for grey in greys],
    )


def write_shards(folder: Path, shards: Sequence[Sequence[Sample]]) -> str:
    """Write finished shards; the folder's name."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, samples in enumerate(shards):
        index = write_tar(str(folder), shard_name(number), iter(samples))
        assert index is not None
        commit(str(folder), index)
    return str(folder)
