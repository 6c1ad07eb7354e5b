from __future__ import annotations

import io
import struct
from pathlib import Path

import av
import numpy as np
import pytest
import simplejpeg
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from audiotext_dist.errors import UserError
from shards.audio import read_audio, to_pcm16
from shards.media import MediaConfig, encode_clip, frame_times, read_frames
from shards.reasons import MediaError
from shards.record import Record
from tests.media_files import FRAMES_PER_SECOND, grey_of, noise, sweep, write_video

RATE_HZ = 16000
SOUND_ONLY = MediaConfig(sample_rate_hz=RATE_HZ, num_frames=0)


def clip(media: Path | None, **fields: object) -> Record:
    return Record(name="clip", media=None if media is None else str(media), recording="r", **fields)  # type: ignore[arg-type]


def decoded(flac: bytes) -> tuple[np.ndarray, int]:
    return soundfile.read(io.BytesIO(flac), dtype="int16")


def reason_of(record: Record, config: MediaConfig) -> str:
    with pytest.raises(MediaError) as caught:
        encode_clip(record, config, "d")
    return caught.value.reason


def greys(jpegs: list[bytes]) -> list[float]:
    return [float(simplejpeg.decode_jpeg(jpeg).mean()) for jpeg in jpegs]


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_a_16_bit_source_at_the_target_rate_is_kept_exactly(tmp_path: Path, suffix: str) -> None:
    pcm = noise(RATE_HZ, 2)
    pcm[:2, 0] = [-32768, 32767]
    soundfile.write(tmp_path / f"a.{suffix}", pcm, RATE_HZ, subtype="PCM_16")
    sample = encode_clip(clip(tmp_path / f"a.{suffix}"), SOUND_ONLY, "d")
    found, rate_hz = decoded(sample.flac)
    np.testing.assert_array_equal(found, pcm[:, 0])
    assert rate_hz == sample.metadata.sample_rate == RATE_HZ
    assert sample.metadata.duration == 1.0


def test_mean_takes_every_channel(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.array([[100, 300]] * 50, np.int16), RATE_HZ)
    config = MediaConfig(sample_rate_hz=RATE_HZ, num_frames=0, channel="mean")
    found, _ = decoded(encode_clip(clip(tmp_path / "a.wav"), config, "d").flac)
    np.testing.assert_array_equal(found, np.full(50, 200))


def test_the_cut_is_the_samples_from_start_up_to_end(tmp_path: Path) -> None:
    pcm = noise(3 * RATE_HZ)
    soundfile.write(tmp_path / "a.wav", pcm, RATE_HZ)
    sample = encode_clip(clip(tmp_path / "a.wav", start_seconds=0.5, end_seconds=1.25), SOUND_ONLY, "d")
    np.testing.assert_array_equal(decoded(sample.flac)[0], pcm[8000:20000, 0])
    assert (sample.metadata.start, sample.metadata.duration) == (0.5, 0.75)
    late = encode_clip(clip(tmp_path / "a.wav", start_seconds=2.5, end_seconds=9.0), SOUND_ONLY, "d")
    np.testing.assert_array_equal(decoded(late.flac)[0], pcm[40000:, 0])


@pytest.mark.parametrize("start", [0.0, 0.01, 3.3, 6.789])
@pytest.mark.parametrize("kind", ["mp4", "mkv", "ogg", "mp3"])
def test_a_cut_of_a_compressed_file_is_where_it_is_in_the_whole(tmp_path: Path, kind: str, start: float) -> None:
    path = tmp_path / f"a.{kind}"
    rate_hz = 44100
    if kind in ("ogg", "mp3"):
        soundfile.write(path, sweep(8.0, rate_hz), rate_hz)
    else:
        write_video(path, 8.0, audio=sweep(8.0, rate_hz), rate_hz=rate_hz)
    whole, found_rate_hz = read_audio(path, 0.0, None, "first")
    part, _ = read_audio(path, start, start + 1.0, "first")
    assert found_rate_hz == rate_hz
    with av.open(str(path)) as container:
        sound = container.streams.audio[0]
        late = max(0, round(float(sound.start_time * sound.time_base) * rate_hz)) if kind in ("mp4", "mkv") else 0
    first = max(0, round(start * rate_hz) - late)
    assert len(part) == round((start + 1) * rate_hz) - late - first
    # Matroska's timestamps are whole milliseconds.
    shifts = range(-30, 31) if kind == "mkv" else [0]
    errors = [np.abs(part[30:-30] - whole[first + shift + 30 :][: len(part) - 60]).max() for shift in shifts]
    # One sample aside, the sweep differs by 0.01 and more.
    assert min(errors) < 2e-3


def test_resampling_is_band_limited() -> None:
    times = np.arange(48000) / 48000
    above = np.sin(2 * np.pi * 12000 * times).astype(np.float32)
    below = np.sin(2 * np.pi * 3000 * times).astype(np.float32)
    assert np.abs(to_pcm16(above, 48000, 16000)[100:-100]).max() < 4
    expected = np.rint(np.sin(2 * np.pi * 3000 * np.arange(16000) / 16000) * 32768)
    np.testing.assert_allclose(to_pcm16(below, 48000, 16000)[100:-100], expected[100:-100], atol=8)


def test_too_loud_is_clipped_not_wrapped() -> None:
    assert to_pcm16(np.array([1.5, -1.5], np.float32), 8000, 8000).tolist() == [32767, -32768]


@given(st.floats(0.02, 1000), st.integers(1, 16))
def test_frame_times_ascend_inside_the_clip(duration: float, num_frames: int) -> None:
    times = frame_times(duration, MediaConfig(num_frames=num_frames))
    assert len(times) == num_frames
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] < duration


def test_four_frames_of_ten_seconds() -> None:
    assert frame_times(10.0, MediaConfig()) == [0.0, 3.333, 6.667, 9.99]
    assert frame_times(10.0, MediaConfig(num_frames=1)) == [5.0]
    assert frame_times(10.0, MediaConfig(num_frames=0)) == []


def test_frames_at_times_of_choice(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 6.0, audio=sweep(6.0, RATE_HZ), rate_hz=RATE_HZ)
    config = MediaConfig(sample_rate_hz=RATE_HZ, frame_times_seconds=[0.5, 1.0, 60.0])
    sample = encode_clip(clip(tmp_path / "a.mp4", start_seconds=2.0, end_seconds=4.0), config, "d")
    assert sample.metadata.frame_times == [0.5, 1.0, 1.99]
    np.testing.assert_allclose(greys(sample.frames), [grey_of(62), grey_of(75), grey_of(99)], atol=4)


@pytest.mark.parametrize("keyframe_distance", ["10", "250"])
@pytest.mark.parametrize("kind", ["mp4", "mkv"])
def test_frames_are_those_on_show_at_their_times(tmp_path: Path, kind: str, keyframe_distance: str) -> None:
    path = tmp_path / f"a.{kind}"
    write_video(path, 30.0, g=keyframe_distance)
    times = [0.0, 0.1, 3.02, 3.03, 14.99, 29.97]
    found = greys(read_frames(path, times, MediaConfig()))
    expected = [grey_of(int(time * FRAMES_PER_SECOND + 1e-6)) for time in times]
    np.testing.assert_allclose(found, expected, atol=4)
    np.testing.assert_allclose(greys(read_frames(path, [28.0], MediaConfig())), [grey_of(700)], atol=4)


def test_a_time_after_the_picture_shows_its_last_frame(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 1.0)
    found = greys(read_frames(tmp_path / "a.mp4", [0.5, 30.0], MediaConfig()))
    np.testing.assert_allclose(found, [grey_of(12), grey_of(24)], atol=4)


def test_frames_belong_to_the_cut(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 6.0, audio=sweep(6.0, RATE_HZ), rate_hz=RATE_HZ)
    config = MediaConfig(sample_rate_hz=RATE_HZ, num_frames=3)
    sample = encode_clip(clip(tmp_path / "a.mp4", start_seconds=2.0, end_seconds=4.0), config, "d")
    assert sample.metadata.frame_times == [0.0, 1.0, 1.99]
    np.testing.assert_allclose(greys(sample.frames), [grey_of(50), grey_of(75), grey_of(99)], atol=4)


@pytest.mark.parametrize(
    ("short", "long", "size"),
    [
        (48, None, (48, 64)),
        (24, None, (24, 32)),
        (500, None, (48, 64)),
        (None, 32, (24, 32)),
        (24, 16, (12, 16)),
        (12, 32, (12, 16)),
        (None, None, (48, 64)),
    ],
)
def test_frames_only_ever_shrink(tmp_path: Path, short: int | None, long: int | None, size: tuple[int, int]) -> None:
    write_video(tmp_path / "a.mp4", 0.2)
    config = MediaConfig(frame_short_side_pixels=short, frame_long_side_pixels=long)
    (jpeg,) = read_frames(tmp_path / "a.mp4", [0.0], config)
    assert simplejpeg.decode_jpeg_header(jpeg)[:2] == size


def test_each_failure_has_its_reason(tmp_path: Path) -> None:
    config = MediaConfig(sample_rate_hz=RATE_HZ, num_frames=2)
    assert reason_of(clip(None), config) == "missing"
    for name in ("no.wav", f"{'x' * 300}.wav", "a\0b.wav"):
        assert reason_of(clip(tmp_path / name), config) == "missing"
    assert reason_of(clip(tmp_path), config) == "unreadable"
    assert reason_of(clip(None, excluded_by=("list.csv",)), config) == "excluded"
    (tmp_path / "nothing.wav").touch()
    assert reason_of(clip(tmp_path / "nothing.wav"), config) == "empty"
    (tmp_path / "text.mp4").write_text("<html>429 Too Many Requests</html>")
    assert reason_of(clip(tmp_path / "text.mp4"), config) == "unreadable"
    write_video(tmp_path / "mute.mp4", 0.5)
    assert reason_of(clip(tmp_path / "mute.mp4"), config) == "no_audio"
    soundfile.write(tmp_path / "zeros.wav", np.zeros(800, np.int16), RATE_HZ)
    assert reason_of(clip(tmp_path / "zeros.wav"), config) == "silent"
    soundfile.write(tmp_path / "sound.wav", noise(800), RATE_HZ)
    assert reason_of(clip(tmp_path / "sound.wav"), config) == "no_picture"
    assert reason_of(clip(tmp_path / "sound.wav", start_seconds=5.0), config) == "empty"
    soundfile.write(tmp_path / "nan.wav", np.full(800, np.nan, np.float32), RATE_HZ, subtype="FLOAT")
    assert reason_of(clip(tmp_path / "nan.wav"), config) == "unreadable"


def test_a_video_cut_short_is_unreadable(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 2.0, audio=sweep(2.0, RATE_HZ), rate_hz=RATE_HZ)
    content = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "half.mp4").write_bytes(content[: len(content) // 2])
    assert reason_of(clip(tmp_path / "half.mp4"), SOUND_ONLY) == "unreadable"


def test_sound_without_picture_is_packed_where_that_is_asked_for(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", noise(800), RATE_HZ)
    config = MediaConfig(sample_rate_hz=RATE_HZ, num_frames=2, require_frames=False)
    sample = encode_clip(clip(tmp_path / "a.wav"), config, "d")
    assert sample.frames == sample.metadata.frame_times == []


def test_tags_in_latin_1_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, noise(800), RATE_HZ)
    title = b"INFOINAM" + struct.pack("<I", 4) + "für\0".encode("latin-1")
    chunk = b"LIST" + struct.pack("<I", len(title)) + title
    content = path.read_bytes()
    path.write_bytes(content[:4] + struct.pack("<I", len(content) - 8 + len(chunk)) + content[8:] + chunk)
    assert reason_of(clip(path), MediaConfig(sample_rate_hz=RATE_HZ)) == "no_picture"


def test_a_cover_image_is_no_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    jpeg = simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8))
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=RATE_HZ, layout="mono")
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 16, 16, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(noise(RATE_HZ).T, format="s16", layout="mono")
        frame.sample_rate = RATE_HZ
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
        packet = av.Packet(jpeg)
        packet.stream, packet.pts, packet.dts = cover, 0, 0
        container.mux(packet)
    with av.open(str(path)) as container:
        assert container.streams.video, "the file has its cover"
    assert reason_of(clip(path), MediaConfig(sample_rate_hz=RATE_HZ)) == "no_picture"


@pytest.mark.parametrize(
    "wrong",
    [
        {"sample_rate_hz": 0},
        {"num_frames": -1},
        {"frame_times_seconds": [1.0, 0.5]},
        {"frame_times_seconds": [-1.0]},
        {"frame_short_side_pixels": 0},
        {"frame_long_side_pixels": 0},
        {"jpeg_quality": 101},
    ],
)
def test_impossible_media_options_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        MediaConfig(**wrong)  # type: ignore[arg-type]
