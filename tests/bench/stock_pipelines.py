"""The usual way to read the same shards: webdataset with its own parts, and what CLAP trainers put into workers."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import simplejpeg
import soundfile
import torch
import torchaudio
import webdataset as wds
from PIL import Image
from torch.utils.data import default_collate
from torchvision import transforms

from audiotext_dist.data.index import SHARD_SUFFIX
from audiotext_dist.storage import expand

BATCH_SIZE = 64
SAMPLE_RATE_HZ = 32000
FRAME_PIXELS = 224
Style = Literal["webdataset", "clap"]


def batches(
    shards: str, style: Style, clip_seconds: float, jpegs: list[str], num_workers: int, num_passes: int
) -> Iterator[Any]:
    """A tar stream, shard and sample shuffle, decode, batch; in DataLoader workers."""
    decode = _Decode(style, round(clip_seconds * SAMPLE_RATE_HZ), jpegs)
    dataset = (
        wds.WebDataset(expand(shards, SHARD_SUFFIX), shardshuffle=100, empty_check=False)
        .shuffle(200)
        .map(decode)
        .batched(BATCH_SIZE, collation_fn=default_collate)
        .repeat(num_passes)
    )
    return iter(wds.WebLoader(dataset, batch_size=None, num_workers=num_workers))


def members(shards: str, num_passes: int) -> Iterator[Any]:
    """Every sample's undecoded members, as webdataset parses them."""
    return iter(wds.WebDataset(expand(shards, SHARD_SUFFIX), shardshuffle=False).repeat(num_passes))


class _Decode:
    """One sample: ``webdataset`` with the decoders of the reader; ``clap`` in floats, with the mel in the worker."""

    def __init__(self, style: Style, num_samples: int, jpegs: list[str]) -> None:
        self._style, self._num_samples, self._jpegs = style, num_samples, jpegs
        self._random = np.random.default_rng(0)
        # CLAP's, and CLIP's as torchvision writes it.
        self._mel = torchaudio.transforms.MelSpectrogram(
            SAMPLE_RATE_HZ, n_fft=1024, win_length=1024, hop_length=320, f_min=50, f_max=14000, n_mels=64, norm=None
        )
        self._to_db = torchaudio.transforms.AmplitudeToDB(top_db=None)
        self._transform = transforms.Compose(
            [
                transforms.Resize(FRAME_PIXELS, transforms.InterpolationMode.BICUBIC),
                transforms.CenterCrop(FRAME_PIXELS),
                transforms.ToTensor(),
                transforms.Normalize((0.48, 0.46, 0.41), (0.27, 0.26, 0.28)),
            ]
        )

    def __call__(self, sample: dict[str, Any]) -> tuple[Any, ...]:
        """(sound, frames) as tensors or arrays."""
        if self._style == "webdataset":
            sound, _ = soundfile.read(io.BytesIO(sample["flac"]), dtype="int16")
            sound = self._fit(sound)
            return sound, np.array([_centre(simplejpeg.decode_jpeg(sample[jpeg])) for jpeg in self._jpegs])
        sound, _ = soundfile.read(io.BytesIO(sample["flac"]), dtype="float32")
        # Through 16 bits and back, as CLAP does.
        sound = (np.clip(sound, -1, 1) * 32767).astype(np.int16).astype(np.float32) / 32767
        mel = self._to_db(self._mel(torch.from_numpy(self._fit(sound))))
        frames = [self._transform(Image.open(io.BytesIO(sample[jpeg])).convert("RGB")) for jpeg in self._jpegs]
        return mel, torch.stack(frames) if frames else 0

    def _fit(self, sound: np.ndarray) -> np.ndarray:
        surplus = len(sound) - self._num_samples
        if surplus > 0:
            start = int(self._random.integers(surplus + 1))
            return sound[start : start + self._num_samples]
        return np.pad(sound, (0, -surplus))


def _centre(image: np.ndarray) -> np.ndarray:
    top, left = (image.shape[0] - FRAME_PIXELS) // 2, (image.shape[1] - FRAME_PIXELS) // 2
    return image[top : top + FRAME_PIXELS, left : left + FRAME_PIXELS]
