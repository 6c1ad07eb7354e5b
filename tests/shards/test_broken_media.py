from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import soundfile

from audiotext_dist.data.sample import Sample
from shards.audio import CONTAINER_TOLERANCE_SECONDS
from shards.media import MediaConfig, read_frames, try_clip
from shards.record import Record
from tests.broken_media import CASES, RATE_HZ, SECONDS, Case, cut, faststart, flac, mkv, mp3, ogg, wav, webm
from tests.media_files import write_video


def outcome_of(path: Path, case: Case) -> Sample | str:
    start, end = case.cut
    record = Record(name="clip", media=path, recording="r", start_seconds=start, end_seconds=end)
    return try_clip(record, MediaConfig(sample_rate_hz=RATE_HZ, num_frames=case.num_frames), "d")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_broken_file_has_its_outcome(case: Case, tmp_path: Path) -> None:
    found = outcome_of(case.write(tmp_path / "clip"), case)
    if case.outcome != "written":
        assert found == case.outcome
        return
    assert isinstance(found, Sample), found
    pcm, rate_hz = soundfile.read(io.BytesIO(found.flac), dtype="int16")
    assert rate_hz == RATE_HZ
    assert pcm.any()
    assert len(found.frames) == case.num_frames
    if case.seconds is not None:
        assert len(pcm) == round(case.seconds * RATE_HZ)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user who may not read a file")
@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_may_not_be_read_is_unreadable(tmp_path: Path, what: str) -> None:
    path = wav(tmp_path / "clip")
    (path if what == "file" else tmp_path).chmod(0)
    os.seteuid(65534)
    try:
        found = outcome_of(path, CASES[0])
    finally:
        os.seteuid(0)
        tmp_path.chmod(0o700)
    assert found == "unreadable"


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
@pytest.mark.parametrize("write", [faststart, mkv, webm, wav, flac, ogg, mp3])
def test_no_cut_passes_as_a_shorter_clip(write: Callable[[Path], Path], share: float, tmp_path: Path) -> None:
    """Wherever a download stopped: the whole sound or a reason."""
    found = outcome_of(cut(write, share)(tmp_path / "clip"), CASES[0])
    if isinstance(found, Sample):
        # The last bytes of a film may hold no sound.
        assert found.metadata.duration > SECONDS - CONTAINER_TOLERANCE_SECONDS
    else:
        assert found in ("truncated", "unreadable", "no_audio")


# Sixteen-sixteen fixed point (the last column two-thirty): a, b, u, c, d, v, x, y, w of ISO 14496-12.
TURNS = {
    90: (0, 0x10000, 0, -0x10000, 0, 0, 48 << 16, 0, 0x40000000),
    180: (-0x10000, 0, 0, 0, -0x10000, 0, 64 << 16, 48 << 16, 0x40000000),
    270: (0, -0x10000, 0, 0x10000, 0, 0, 0, 64 << 16, 0x40000000),
}


@pytest.mark.parametrize("clockwise", [90, 180, 270])
def test_a_film_of_a_turned_phone_stands_upright(tmp_path: Path, clockwise: int) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, 0.2, corner=True)
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 40
    content[at : at + 36] = struct.pack(">9i", *TURNS[clockwise])
    before = simplejpeg.decode_jpeg(read_frames(path, [0.0], MediaConfig())[0])
    path.write_bytes(content)
    after = simplejpeg.decode_jpeg(read_frames(path, [0.0], MediaConfig())[0])
    np.testing.assert_allclose(after, np.rot90(before, -clockwise // 90), atol=12)
    assert np.abs(after.astype(int) - after[::-1, ::-1]).max() > 50, "the picture has an up and a down"
