"""One rank's part of a global batch, and how decoded clips become one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from audiotext_dist.data.bad_samples import BadSample
from audiotext_dist.data.batch_memory import BatchArrays
from audiotext_dist.data.decode import Clip
from audiotext_dist.data.read_counts import ReadCounts
from audiotext_dist.data.sample import ClipMetadata
from audiotext_dist.losses.targets import join_teachers

Tokenize = Callable[[list[str]], torch.Tensor]
SMALL_TENSOR_BYTES = 1 << 16


@dataclass(kw_only=True)
class Batch:
    """One rank's part of a global batch: B clips.

    waveform_BS int16, num_valid_samples_B int64, frames_BLHWC uint8 (L may be 0), frame_numbers_BL int64 (which
    of the clip's frames these are), lone_frame_B int64 (which of them stands for the clip alone), mask_uniforms_B4
    float32, tokens_BC int64 or None without a text tower; the rest are plain lists of length B, but for counts, which
    say what the process that made the batch has read since the one before. Where features are read,
    frame_embeddings_BLD float32 has every frame of a clip, and caption_embeddings_ND that of its drawn caption, at
    evaluation of all its captions, clip after clip. Where there are teachers, teacher_audio_BE and teacher_captions_BE
    float32 are theirs of the clip and of its drawn caption, joined (``losses.targets.join_teachers``).
    """

    keys: list[str]
    metadata: list[ClipMetadata]
    captions: list[str]
    waveform_BS: torch.Tensor
    num_valid_samples_B: torch.Tensor
    frames_BLHWC: torch.Tensor
    frame_numbers_BL: torch.Tensor
    lone_frame_B: torch.Tensor
    mask_uniforms_B4: torch.Tensor
    tokens_BC: torch.Tensor | None
    bad_samples: list[BadSample]
    counts: ReadCounts = field(default_factory=ReadCounts)
    frame_embeddings_BLD: torch.Tensor | None = None
    caption_embeddings_ND: torch.Tensor | None = None
    teacher_audio_BE: torch.Tensor | None = None
    teacher_captions_BE: torch.Tensor | None = None

    @property
    def frame_embeddings_BD(self) -> torch.Tensor | None:
        """The embedding of the frame that stands for each clip; None without features."""
        return None if self.frame_embeddings_BLD is None else _picked(self.frame_embeddings_BLD, self.lone_frame_B)

    @property
    def frames_BHWC(self) -> torch.Tensor | None:
        """The frame that stands for each clip, be it decoded alone or among all; None without pictures."""
        match self.frames_BLHWC.shape[1]:
            case 0:
                return None
            case 1:
                return self.frames_BLHWC[:, 0]
        return _picked(self.frames_BLHWC, self.lone_frame_B)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from which a GPU copies it while the CPU goes on."""
        return self._with_tensors(torch.Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on the device."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def _with_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return dataclasses.replace(self, **changed)

    # A tensor comes out of a worker through shared memory and a socket of its own: small ones go as plain bytes.
    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value.numpy() if isinstance(value, torch.Tensor) and value.nbytes < SMALL_TENSOR_BYTES else value
            for name, value in vars(self).items()
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, torch.from_numpy(value) if isinstance(value, np.ndarray) else value)


def collate(
    clips: Sequence[Clip], arrays: BatchArrays, bad_samples: list[BadSample], tokenize: Tokenize | None
) -> Batch:
    """The clips that were decoded into these arrays; the caption of each is the one that was drawn for it."""
    filled = arrays.first(len(clips), len(clips[0].frame_numbers))
    waveform_BS, frames_BLHWC = (torch.from_numpy(array) for array in filled)
    captions = [clip.metadata.text[clip.caption_number] if clip.metadata.text else "" for clip in clips]
    by_teacher = list(zip(*(clip.teachers for clip in clips), strict=True))
    return Batch(
        keys=[clip.key for clip in clips],
        metadata=[clip.metadata for clip in clips],
        captions=captions,
        waveform_BS=waveform_BS,
        num_valid_samples_B=torch.tensor([clip.num_valid_samples for clip in clips]),
        frames_BLHWC=frames_BLHWC,
        frame_numbers_BL=torch.tensor([clip.frame_numbers for clip in clips], dtype=torch.int64),
        lone_frame_B=torch.tensor([clip.lone_frame for clip in clips]),
        mask_uniforms_B4=torch.from_numpy(np.stack([clip.mask_uniforms for clip in clips])),
        tokens_BC=tokenize(captions) if tokenize is not None else None,
        bad_samples=bad_samples,
        frame_embeddings_BLD=_joined(np.stack, [clip.frame_embeddings for clip in clips]),
        caption_embeddings_ND=_joined(np.concatenate, [clip.caption_embeddings for clip in clips]),
        teacher_audio_BE=_joined_teachers([[rows.audio_1E for rows in teacher] for teacher in by_teacher]),
        teacher_captions_BE=_joined_teachers([[rows.captions_CE for rows in teacher] for teacher in by_teacher]),
    )


def _picked(all_BLX: torch.Tensor, number_B: torch.Tensor) -> torch.Tensor:
    return all_BLX[torch.arange(len(number_B), device=number_B.device), number_B]


def _joined(
    join: Callable[[list[NDArray[np.float32]]], NDArray[np.float32]], parts: Sequence[NDArray[np.float32] | None]
) -> torch.Tensor | None:
    found = [part for part in parts if part is not None]
    return torch.from_numpy(join(found)) if found else None


def _joined_teachers(by_teacher: Sequence[Sequence[NDArray[np.float32]]]) -> torch.Tensor | None:
    """One side's embeddings by each teacher, a row [1, E] a clip -> [B, sum of E]."""
    return join_teachers([torch.from_numpy(np.concatenate(rows)) for rows in by_teacher]) if by_teacher else None
