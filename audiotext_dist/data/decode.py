"""From a shard's bytes to arrays of fixed shape: all that a DataLoader worker does.

The audio stays int16 and the frames uint8; spectrograms and normalisation happen in batches on the
training device. Random choices (crop, frame, caption, masks) come from (seed, epoch, clip), so they are
the same on any number of ranks and workers.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import simplejpeg
import soundfile
from numpy.typing import NDArray
from PIL import Image

from audiotext_dist.data.bad_samples import BadSampleError
from audiotext_dist.data.plan import Slot
from audiotext_dist.data.sample import AUDIO_MEMBER, METADATA_MEMBER, ClipMetadata, frame_member
from audiotext_dist.data.shard_reader import ShardReader, Verify

FrameChoice = Literal["none", "random", "middle", "all"]
# What may stand in a tar by mistake or malice; a picture of this size fills 150 MB.
MAX_PICTURE_PIXELS = 50_000_000


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """The shape that every clip is brought to; of a sound with several channels the first is taken.

    clip_seconds: longer clips are cropped (at random in training, else from the start), shorter ones
    padded with zeros at the end. audio: false leaves the sound undecoded, for tasks without it. frames:
    which of a clip's frames are chosen. pictures: false leaves those undecoded, where their embeddings are
    read instead. max_audio_seconds: a longer sound is a bad sample. verify: see ``ShardReader``.
    """

    sample_rate_hz: int
    clip_seconds: float
    audio: bool
    frames: FrameChoice
    num_frames: int
    frame_pixels: int
    random: bool
    max_audio_seconds: float = 3600.0
    verify: Verify = "size"
    pictures: bool = True

    @property
    def clip_samples(self) -> int:
        """Audio samples of every decoded clip."""
        return round(self.clip_seconds * self.sample_rate_hz) if self.audio else 0

    @property
    def num_pictures(self) -> int:
        """Pictures of every decoded clip."""
        return len(chosen_frames(self, 0.0)) if self.pictures else 0


class ClipArrays(NamedTuple):
    """Where a clip is decoded to: waveform_S int16 [clip_samples], frames_LHWC uint8 [num_pictures, P, P, 3]."""

    waveform_S: NDArray[np.int16]
    frames_LHWC: NDArray[np.uint8]

    @classmethod
    def empty(cls, config: DecodeConfig) -> ClipArrays:
        """Arrays of its own."""
        pixels = config.frame_pixels
        return cls(
            np.empty(config.clip_samples, np.int16), np.empty((config.num_pictures, pixels, pixels, 3), np.uint8)
        )


class TeacherRows(NamedTuple):
    """What one teacher says of a clip: audio_1E float32 [1, E], captions_CE float32 [captions, E]."""

    audio_1E: NDArray[np.float32]
    captions_CE: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One decoded clip.

    waveform: int16 [clip_samples]. num_valid_samples: how many of them are sound, not padding. frames:
    uint8 [frames chosen, frame_pixels, frame_pixels, 3]. frame_numbers: which of the clip's frames were chosen.
    lone_frame: the one that stands for the clip where one does, random in training, the middle one at evaluation.
    mask_uniforms: float32 [4] in [0, 1), where SpecAugment's masks lie. caption_number: which of metadata.text
    was drawn, -1 without captions. frame_embeddings: float32 [num_frames, D] of every frame, caption_embeddings:
    float32 [captions, D], where a run reads features. teachers: what each of a run's teachers says of it.
    """

    key: str
    metadata: ClipMetadata
    waveform: NDArray[np.int16]
    num_valid_samples: int
    frames: NDArray[np.uint8]
    frame_numbers: list[int]
    lone_frame: int
    mask_uniforms: NDArray[np.float32]
    caption_number: int
    frame_embeddings: NDArray[np.float32] | None = None
    caption_embeddings: NDArray[np.float32] | None = None
    teachers: tuple[TeacherRows, ...] = ()

    def with_drawn_caption(self) -> Clip:
        """Of the embeddings of its captions only the drawn one's."""
        drawn, known = [self.caption_number], self.caption_embeddings
        if known is None and not self.teachers:
            return self
        return replace(
            self,
            caption_embeddings=None if known is None else known[drawn],
            teachers=tuple(TeacherRows(each.audio_1E, each.captions_CE[drawn]) for each in self.teachers),
        )


def clip_uniforms(seed: int, epoch: int, copy: int, source: str, key: str) -> NDArray[np.float64]:
    """The random numbers that belong to one appearance of a clip in one epoch: seven, in [0, 1).

    source: its dataset, or what else tells clips of equal keys apart.

    Bits of a hash: a numpy generator that gives seven numbers takes six times as long to start.
    """
    drawn = hashlib.blake2b(f"{seed} {epoch} {copy} {source}/{key}".encode(errors="surrogatepass"), digest_size=28)
    # 24 bits each: below 1 as float32 too.
    return (np.frombuffer(drawn.digest(), np.dtype("<u4")) >> 8).astype(np.float64) * 2.0**-24


def decode_clip(
    reader: ShardReader,
    key: str,
    slot: Slot,
    config: DecodeConfig,
    *,
    seed: int,
    epoch: int,
    into: ClipArrays | None = None,
) -> Clip:
    """Read and decode one slot's row.

    Args:
        into: where its sound and pictures go; by default into arrays of its own.

    Raises:
        BadSampleError: anything wrong with this one sample.
    """
    shard, row = slot.shard, slot.row
    into = ClipArrays.empty(config) if into is None else into
    metadata = decode_metadata(reader.read(shard, row, METADATA_MEMBER), key)
    # Tars from elsewhere may name no dataset, and number their clips each from 0.
    source = metadata.dataset or reader.sha256(shard)
    uniforms = clip_uniforms(seed, epoch, slot.copy, source, key)
    crop_uniform, frame_uniform, caption_uniform = uniforms[:3].tolist()
    if slot.copy:
        # The copies of a clip begin at one caption and go on with the next: weight 5 shows each of five once.
        caption_uniform = clip_uniforms(seed, epoch, 0, source, key)[2]
    num_valid_samples = 0
    if config.audio:
        flac = reader.read(shard, row, AUDIO_MEMBER)
        num_valid_samples = _decode_audio(flac, config, crop_uniform if config.random else 0.0, into.waveform_S)
    frame_numbers = chosen_frames(config, frame_uniform)
    if config.pictures:
        for place, number in enumerate(frame_numbers):
            into.frames_LHWC[place] = square_frame(reader.read(shard, row, frame_member(number)), config.frame_pixels)
    return Clip(
        key=key,
        metadata=metadata,
        waveform=into.waveform_S,
        num_valid_samples=num_valid_samples,
        frames=into.frames_LHWC,
        frame_numbers=frame_numbers,
        lone_frame=lone_frame(config, frame_uniform),
        mask_uniforms=uniforms[3:].astype(np.float32),
        caption_number=_drawn_caption(caption_uniform, slot.copy, len(metadata.text)),
    )


def _drawn_caption(uniform: float, copy: int, num_captions: int) -> int:
    return (int(uniform * num_captions) + copy) % num_captions if num_captions else -1


def chosen_frames(config: DecodeConfig, frame_uniform: float) -> list[int]:
    """The numbers of the frames that stand for a clip; ``frame_uniform`` in [0, 1) places the random one."""
    match config.frames:
        case "none":
            return []
        case "random":
            return [_random_frame(config, frame_uniform)]
        case "middle":
            return [config.num_frames // 2]
        case "all":
            return list(range(config.num_frames))


def lone_frame(config: DecodeConfig, frame_uniform: float) -> int:
    """The number of the frame that stands for a clip alone, be it decoded alone or among all."""
    return _random_frame(config, frame_uniform) if config.random else config.num_frames // 2


def _random_frame(config: DecodeConfig, frame_uniform: float) -> int:
    return int(frame_uniform * config.num_frames)


def decode_metadata(content: bytes, key: str) -> ClipMetadata:
    """A clip's JSON.

    Raises:
        BadSampleError: it is none.
    """
    try:
        return ClipMetadata.from_json(content, key)
    except (ValueError, TypeError) as error:
        raise BadSampleError(f"json does not decode ({error})", "broken_json") from None


def _decode_audio(flac: bytes, config: DecodeConfig, crop_uniform: float, waveform_S: NDArray[np.int16]) -> int:
    """Fill the waveform, zeros after the sound's end; how many samples are sound."""
    try:
        with soundfile.SoundFile(io.BytesIO(flac)) as file:
            if file.samplerate != config.sample_rate_hz:
                raise BadSampleError(f"audio has {file.samplerate} Hz, not {config.sample_rate_hz}", "sample_rate")
            if file.frames > config.max_audio_seconds * config.sample_rate_hz:
                hours = file.frames / config.sample_rate_hz / 3600
                raise BadSampleError(f"audio says that it lasts {hours:.3g} hours", "too_large")
            # Only the crop is decoded: half an hour in a ten-second set costs ten seconds.
            surplus = max(file.frames - config.clip_samples, 0)
            if start := int(crop_uniform * (surplus + 1)):
                file.seek(start)
            num_expected: int = file.frames - surplus
            if file.channels == 1:
                num_found = len(file.read(dtype="int16", out=waveform_S[:num_expected]))
            else:
                found = file.read(num_expected, dtype="int16", always_2d=True)
                num_found = len(found)
                waveform_S[:num_found] = found[:, 0]
    except soundfile.LibsndfileError as error:
        raise BadSampleError(f"audio does not decode ({error})", "broken_audio") from None
    if num_found != num_expected or not num_expected:
        raise BadSampleError(f"audio ends after {num_found} of {num_expected} samples", "broken_audio")
    waveform_S[num_expected:] = 0
    return num_expected


def square_frame(jpeg: bytes, pixels: int) -> NDArray[np.uint8]:
    """Decode a JPEG to uint8 [pixels, pixels, 3]: the square at the centre, resized.

    CLIP resizes first, which differs along the square's edges by what the filter sees beyond them.

    A frame stored at this size already, the case to build shards for, is only decoded.

    Raises:
        BadSampleError: the JPEG does not decode, or says that it is enormous.
    """
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(jpeg)
        if height * width > MAX_PICTURE_PIXELS:
            raise BadSampleError(f"jpg says that it has {width} x {height} pixels", "too_large")
        image: NDArray[np.uint8] = simplejpeg.decode_jpeg(jpeg, colorspace="RGB")
    except ValueError as error:
        raise BadSampleError(f"jpg does not decode ({error})", "broken_frame") from None
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    image = image[top : top + side, left : left + side]
    if side == pixels:
        return image
    # PIL, not the device: frames of one batch come in different sizes.
    resized = Image.fromarray(image).resize((pixels, pixels), Image.Resampling.BICUBIC)
    return np.asarray(resized)
