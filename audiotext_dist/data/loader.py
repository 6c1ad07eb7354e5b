"""From a plan to batches, in plain DataLoader workers.

1. ``TrainingBatches`` makes, for a step of the run, this rank's part of its global batch: the plan says
   which rows, ``decode`` reads them (and ``features`` what frozen encoders said of them), a row that is no
   good is replaced by the plan's next one and reported.
2. A DataLoader over all steps that are left runs that in workers, in order; the workers live as
   long as the run, and an epoch's end is no stop for them.
"""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from audiotext_dist import storage
from audiotext_dist.data.bad_samples import BadSample, BadSampleError
from audiotext_dist.data.batch_memory import PREFETCH_FACTOR, BatchArrays, BatchMemory
from audiotext_dist.data.cache import NodeCache, ReadCounts
from audiotext_dist.data.decode import Clip, ClipArrays, DecodeConfig, decode_clip
from audiotext_dist.data.features import Features
from audiotext_dist.data.index import Shard
from audiotext_dist.data.plan import Plan, Slot, evaluation_slots
from audiotext_dist.data.prefetch import Prefetcher
from audiotext_dist.data.sample import ClipMetadata
from audiotext_dist.data.shard_reader import ShardReader
from audiotext_dist.distributed import World, raise_together
from audiotext_dist.errors import UserError
from audiotext_dist.memory import keep_freed_memory

Tokenize = Callable[[list[str]], torch.Tensor]
MAX_REPLACEMENTS = 64
NO_FEATURES = Features()
SMALL_TENSOR_BYTES = 1 << 16
_ELSEWHERE = torch.empty(0, dtype=torch.uint8)


@dataclass(kw_only=True)
class Batch:
    """One rank's part of a global batch: B clips.

    waveform_BS int16, num_valid_samples_B int64, frames_BLHWC uint8 (L may be 0), frame_numbers_BL int64 (which
    of the clip's frames these are), mask_uniforms_B4 float32, tokens_BC int64 or None without a text tower; the
    rest are plain lists of length B, but for counts, which say what the process that made the batch has read since
    the one before. Where features are read, frame_embeddings_BLD float32 has every frame of a clip, and
    caption_embeddings_ND that of its drawn caption, at evaluation of all its captions, clip after clip.
    """

    keys: list[str]
    metadata: list[ClipMetadata]
    captions: list[str]
    waveform_BS: torch.Tensor
    num_valid_samples_B: torch.Tensor
    frames_BLHWC: torch.Tensor
    frame_numbers_BL: torch.Tensor
    mask_uniforms_B4: torch.Tensor
    tokens_BC: torch.Tensor | None
    bad_samples: list[BadSample]
    counts: ReadCounts = field(default_factory=ReadCounts)
    frame_embeddings_BLD: torch.Tensor | None = None
    caption_embeddings_ND: torch.Tensor | None = None

    @property
    def frame_embeddings_BD(self) -> torch.Tensor | None:
        """The embedding of each clip's chosen frame, the first where there are several; None without features."""
        if self.frame_embeddings_BLD is None:
            return None
        place_B = torch.arange(len(self.keys), device=self.frame_numbers_BL.device)
        return self.frame_embeddings_BLD[place_B, self.frame_numbers_BL[:, 0]]

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory (called by the DataLoader)."""
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


class TrainingBatches(Dataset[Batch]):
    """This rank's part of every global batch, by the step of the run, counted from 0.

    Args:
        plan_of: the plan of an epoch; every epoch has the same number of batches.
        features: of the shards of all sets, numbered together.
    """

    def __init__(
        self,
        sets: Sequence[Sequence[Shard]],
        plan_of: Callable[[int], Plan],
        decode: DecodeConfig,
        *,
        seed: int,
        world: World,
        tokenize: Tokenize | None,
        features: Features = NO_FEATURES,
        cache: NodeCache | None = None,
    ) -> None:
        self._features = features
        self._shards = [shard for shards in sets for shard in shards]
        cache = NodeCache() if cache is None else cache
        self._reader = ShardReader(self._shards, cache, verify=decode.verify)
        self._plan_of = lru_cache(maxsize=4)(plan_of)  # the first epoch's, the last one's, this one's, the next one's
        self._num_batches = self._plan_of(0).num_batches
        self.memory = BatchMemory(len(self._plan_of(0).batch(0, rank=world.rank, world_size=world.size)), decode)
        self._decode, self._seed, self._world, self._tokenize = decode, seed, world, tokenize
        ahead = partial(_shards_ahead, self._plan_of, world)
        self._prefetcher = Prefetcher(cache, self._shards, ahead, max_bytes=cache.max_bytes // world.local_size)

    def __getitem__(self, step: int) -> Batch:
        """The batch; every slot is filled.

        Raises:
            UserError: so many samples in a row cannot be decoded that the set must be broken.
        """
        self._reader.close_removed()
        self._prefetcher.advance(step)
        bad_samples: list[BadSample] = []
        arrays = self.memory.take()
        clips = [
            self._decode_or_replace(step, place, slot, arrays.clip(place), bad_samples)
            for place, slot in enumerate(self._own_slots(step))
        ]
        batch = collate(clips, arrays, bad_samples, self._tokenize)
        batch.counts = self._reader.take_counts()
        batch.counts += self._prefetcher.take_counts()
        return batch

    def _own_slots(self, step: int) -> list[Slot]:
        epoch, number = divmod(step, self._num_batches)
        return self._plan_of(epoch).batch(number, rank=self._world.rank, world_size=self._world.size)

    def _decode_or_replace(
        self, step: int, place: int, slot: Slot, into: ClipArrays, bad_samples: list[BadSample]
    ) -> Clip:
        epoch = step // self._num_batches
        for ahead in range(1, MAX_REPLACEMENTS + 1):
            shard = self._shards[slot.shard]
            key = shard.index.keys[slot.row]
            try:
                clip = decode_clip(self._reader, key, slot, self._decode, seed=self._seed, epoch=epoch, into=into)
                needs_caption = self._tokenize is not None or self._features.captions is not None
                if needs_caption and clip.caption_number < 0:
                    raise BadSampleError("it has no caption", "no_caption")
                clip = self._features.added_to(clip, slot)
                if clip.caption_embeddings is None:
                    return clip
                return dataclasses.replace(clip, caption_embeddings=clip.caption_embeddings[[clip.caption_number]])
            except BadSampleError as error:
                bad_samples.append(BadSample(storage.public_name(shard.path), key, error.kind, str(error)))
            # The same place of the next batch, be it the next epoch's: of its own lane, so that the number of
            # ranks does not matter.
            slot = self._own_slots(step + ahead)[place]
        raise UserError(
            f"{MAX_REPLACEMENTS} samples in a row cannot be used, the last {bad_samples[-1].key} of "
            f"{bad_samples[-1].shard} ({bad_samples[-1].reason}): rebuild the shards of this set"
        )


class EvaluationBatches(Dataset[Batch]):
    """This rank's share of a whole set, each clip once, in a fixed order; a clip that fails is an error."""

    def __init__(
        self,
        shards: Sequence[Shard],
        decode: DecodeConfig,
        *,
        world: World,
        batch_size: int,
        features: Features = NO_FEATURES,
        cache: NodeCache | None = None,
    ) -> None:
        assert not decode.random, "evaluation takes fixed crops and frames"
        self._shards, self._features = shards, features
        cache = NodeCache() if cache is None else cache
        self._reader = ShardReader(shards, cache, verify=decode.verify)
        self._decode = decode
        self.memory = BatchMemory(batch_size, decode)
        slots = evaluation_slots([shard.index.num_samples for shard in shards], rank=world.rank, world_size=world.size)
        self._batches = [slots[start : start + batch_size] for start in range(0, len(slots), batch_size)]
        ahead = partial(_shards_of, self._batches)
        self._prefetcher = Prefetcher(cache, shards, ahead, max_bytes=cache.max_bytes // world.local_size)

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> Batch:
        """The batch; the last one may be shorter.

        Raises:
            UserError: a clip cannot be decoded; a silently smaller test set would not compare.
        """
        self._reader.close_removed()
        self._prefetcher.advance(number)
        arrays = self.memory.take()
        clips = [self._decode_slot(slot, arrays.clip(place)) for place, slot in enumerate(self._batches[number])]
        return collate(clips, arrays, [], None)

    def _decode_slot(self, slot: Slot, into: ClipArrays) -> Clip:
        shard = self._shards[slot.shard]
        key = shard.index.keys[slot.row]
        try:
            clip = decode_clip(self._reader, key, slot, self._decode, seed=0, epoch=0, into=into)
            return self._features.added_to(clip, slot)
        except BadSampleError as error:
            raise UserError(
                f"clip {key} of {storage.public_name(shard.path)} cannot be evaluated ({error}): rebuild that shard"
            ) from None


def _shards_ahead(plan_of: Callable[[int], Plan], world: World, step: int) -> Iterator[int]:
    """The shards that a rank needs from a step of the run on, until the next epoch's end."""
    epoch, number = divmod(step, plan_of(0).num_batches)
    for each, first in ((epoch, number), (epoch + 1, 0)):
        yield from plan_of(each).shards_ahead(first, rank=world.rank, world_size=world.size)


def _shards_of(batches: Sequence[Sequence[Slot]], number: int) -> Iterator[int]:
    return (slot.shard for batch in batches[number:] for slot in batch)


def collate(
    clips: Sequence[Clip], arrays: BatchArrays, bad_samples: list[BadSample], tokenize: Tokenize | None
) -> Batch:
    """The clips that were decoded into these arrays; the caption of each is the one that was drawn for it."""
    waveform_BS, frames_BLHWC = (torch.from_numpy(array) for array in arrays.first(len(clips)))
    captions = [clip.metadata.text[clip.caption_number] if clip.metadata.text else "" for clip in clips]
    return Batch(
        keys=[clip.key for clip in clips],
        metadata=[clip.metadata for clip in clips],
        captions=captions,
        waveform_BS=waveform_BS,
        num_valid_samples_B=torch.tensor([clip.num_valid_samples for clip in clips]),
        frames_BLHWC=frames_BLHWC,
        frame_numbers_BL=torch.tensor([clip.frame_numbers for clip in clips], dtype=torch.int64),
        mask_uniforms_B4=torch.from_numpy(np.stack([clip.mask_uniforms for clip in clips])),
        tokens_BC=tokenize(captions) if tokenize is not None else None,
        bad_samples=bad_samples,
        frame_embeddings_BLD=_joined(np.stack, [clip.frame_embeddings for clip in clips]),
        caption_embeddings_ND=_joined(np.concatenate, [clip.caption_embeddings for clip in clips]),
    )


def _joined(
    join: Callable[[list[NDArray[np.float32]]], NDArray[np.float32]], parts: Sequence[NDArray[np.float32] | None]
) -> torch.Tensor | None:
    found = [part for part in parts if part is not None]
    return torch.from_numpy(join(found)) if found else None


def in_step(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches; a rank that cannot have its next one ends the others as well, instead of leaving them to wait.

    Raises:
        UserError: on every rank, what one of them has met.
    """
    while True:
        batch, error = None, None
        try:
            batch = next(batches, None)
        except UserError as met:
            error = met
        raise_together(error)
        if batch is None:
            return
        yield batch


class Batches(Protocol):
    """Batches by number, in arrays of one memory."""

    memory: BatchMemory

    def __getitem__(self, number: int) -> Batch: ...


class _InWorker(Dataset[tuple[Batch, tuple[int, int]] | UserError]):
    """Batches as a worker hands them over: without the arrays, but with their place in its ring.

    A ``UserError`` is an item too: raised in a worker, it would come back wrapped in a traceback.
    """

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def __getitem__(self, number: int) -> tuple[Batch, tuple[int, int]] | UserError:
        try:
            batch = self._batches[number]
        except UserError as error:
            return error
        place = self._batches.memory.taken_last()
        return dataclasses.replace(batch, waveform_BS=_ELSEWHERE, frames_BLHWC=_ELSEWHERE), place


def iterate(batches: Batches, numbers: range, *, num_workers: int, device: torch.device) -> Iterator[Batch]:
    """The batches of these numbers, in order, decoded ahead by the workers, on the device."""
    made = _made_by_workers(batches, numbers, num_workers) if num_workers else _made_here(batches, numbers)
    for batch in made:
        yield (batch.pin_memory() if device.type == "cuda" else batch).to(device)


def _made_here(batches: Batches, numbers: range) -> Iterator[Batch]:
    keep_freed_memory()
    try:
        yield from map(batches.__getitem__, numbers)
    except UserError as error:
        error.on_every_rank = False
        raise


def _made_by_workers(batches: Batches, numbers: range, num_workers: int) -> Iterator[Batch]:
    batches.memory.share(num_workers)
    loader = DataLoader(
        _InWorker(batches),
        batch_size=None,
        sampler=numbers,
        num_workers=num_workers,
        prefetch_factor=PREFETCH_FACTOR,
        multiprocessing_context="fork",  # by which the workers have the rings
        worker_init_fn=_start_worker,
    )
    for item in loader:
        if isinstance(item, UserError):
            item.on_every_rank = False
            raise item
        batch, (worker, place) = item
        arrays = batches.memory.at(worker, place).first(len(batch.keys)).copy()
        yield dataclasses.replace(
            batch,
            waveform_BS=torch.from_numpy(arrays.waveform_BS),
            frames_BLHWC=torch.from_numpy(arrays.frames_BLHWC),
        )


def _start_worker(_: int) -> None:
    keep_freed_memory()
    # A launcher signals workers as well; a rank that is asked to stop still needs its own until the step's end.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
