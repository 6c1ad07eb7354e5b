"""From a plan to batches, in plain DataLoader workers.

1. ``TrainingBatches`` makes, for a step of the run, this rank's part of its global batch: the plan says
   which rows, ``decode`` reads them, a row that is no good is replaced by the plan's next one and reported.
2. A DataLoader over all steps that are left runs that in workers, in order; the workers live as
   long as the run, and an epoch's end is no stop for them.
"""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from audiotext_dist import storage
from audiotext_dist.data.cache import NodeCache, ReadCounts
from audiotext_dist.data.decode import (
    BadSampleError,
    Clip,
    DecodeConfig,
    ShardReader,
    decode_clip,
)
from audiotext_dist.data.index import Shard
from audiotext_dist.data.plan import Plan, Slot, evaluation_slots
from audiotext_dist.data.prefetch import Prefetcher
from audiotext_dist.data.sample import ClipMetadata
from audiotext_dist.distributed import World, raise_together
from audiotext_dist.errors import UserError

Tokenize = Callable[[list[str]], torch.Tensor]
MAX_REPLACEMENTS = 64


class BadSample(NamedTuple):
    """A sample that was passed over, for the log."""

    shard: str
    key: str
    reason: str


@dataclass(kw_only=True)
class Batch:
    """One rank's part of a global batch: B clips.

    waveform_BS int16, num_valid_samples_B int64, frames_BLHWC uint8 (L may be 0), mask_uniforms_B4
    float32, tokens_BC int64 or None without a text tower; the rest are plain lists of length B, but for counts,
    which say what the process that made the batch has read since the one before.
    """

    keys: list[str]
    metadata: list[ClipMetadata]
    captions: list[str]
    waveform_BS: torch.Tensor
    num_valid_samples_B: torch.Tensor
    frames_BLHWC: torch.Tensor
    mask_uniforms_B4: torch.Tensor
    tokens_BC: torch.Tensor | None
    bad_samples: list[BadSample]
    counts: ReadCounts = field(default_factory=ReadCounts)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory (called by the DataLoader)."""
        return self._with_tensors(torch.Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on the device."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def _with_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        changed = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(changed, name, change(value))
        return changed


class TrainingBatches(Dataset[Batch]):
    """This rank's part of every global batch, by the step of the run, counted from 0.

    Args:
        plan_of: the plan of an epoch; every epoch has the same number of batches.
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
        cache: NodeCache | None = None,
    ) -> None:
        self._shards = [shard for shards in sets for shard in shards]
        cache = NodeCache() if cache is None else cache
        self._reader = ShardReader(self._shards, cache)
        self._plan_of = lru_cache(maxsize=4)(plan_of)  # the first epoch's, the last one's, this one's, the next one's
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
        epoch, number = divmod(step, self._plan_of(0).num_batches)
        bad_samples: list[BadSample] = []
        clips = [
            self._decode_or_replace(epoch, number, place, slot, bad_samples)
            for place, slot in enumerate(self._own_slots(epoch, number))
        ]
        batch = collate(clips, bad_samples, self._tokenize)
        batch.counts = self._reader.take_counts()
        batch.counts += self._prefetcher.take_counts()
        return batch

    def _own_slots(self, epoch: int, number: int) -> list[Slot]:
        plan = self._plan_of(epoch)
        return plan.batch(number % plan.num_batches, rank=self._world.rank, world_size=self._world.size)

    def _decode_or_replace(self, epoch: int, number: int, place: int, slot: Slot, bad_samples: list[BadSample]) -> Clip:
        for step in range(1, MAX_REPLACEMENTS + 1):
            shard = self._shards[slot.shard]
            key = shard.index.keys[slot.row]
            try:
                clip = decode_clip(self._reader, key, slot, self._decode, seed=self._seed, epoch=epoch)
                if self._tokenize is not None and clip.caption_number < 0:
                    raise BadSampleError("no caption")
                return clip
            except BadSampleError as error:
                bad_samples.append(BadSample(storage.public_name(shard.path), key, str(error)))
            # The same place of the next batch: its lane's next sample, whatever the number of ranks.
            slot = self._own_slots(epoch, number + step)[place]
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
        cache: NodeCache | None = None,
    ) -> None:
        assert not decode.random, "evaluation takes fixed crops and frames"
        self._shards = shards
        cache = NodeCache() if cache is None else cache
        self._reader = ShardReader(shards, cache)
        self._decode = decode
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
        return collate([self._decode_slot(slot) for slot in self._batches[number]], [], None)

    def _decode_slot(self, slot: Slot) -> Clip:
        shard = self._shards[slot.shard]
        key = shard.index.keys[slot.row]
        try:
            return decode_clip(self._reader, key, slot, self._decode, seed=0, epoch=0)
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


def collate(clips: Sequence[Clip], bad_samples: list[BadSample], tokenize: Tokenize | None) -> Batch:
    """Stack decoded clips; the caption of each is the one that was drawn for it."""
    captions = [clip.metadata.text[clip.caption_number] if clip.metadata.text else "" for clip in clips]
    return Batch(
        keys=[clip.key for clip in clips],
        metadata=[clip.metadata for clip in clips],
        captions=captions,
        waveform_BS=torch.from_numpy(np.stack([clip.waveform for clip in clips])),
        num_valid_samples_B=torch.tensor([clip.num_valid_samples for clip in clips]),
        frames_BLHWC=torch.from_numpy(np.stack([clip.frames for clip in clips])),
        mask_uniforms_B4=torch.from_numpy(np.stack([clip.mask_uniforms for clip in clips])),
        tokens_BC=tokenize(captions) if tokenize is not None else None,
        bad_samples=bad_samples,
    )


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


class _ErrorsAsItems(Dataset[Batch | UserError]):
    """Hands a ``UserError`` over as an item: raised in a worker, it would come back wrapped in a traceback."""

    def __init__(self, batches: Dataset[Batch]) -> None:
        self._batches = batches

    def __getitem__(self, number: int) -> Batch | UserError:
        try:
            return self._batches[number]
        except UserError as error:
            return error


def iterate(batches: Dataset[Batch], numbers: range, *, num_workers: int, device: torch.device) -> Iterator[Batch]:
    """The batches of these numbers, in order, decoded ahead by the workers, on the device."""
    loader = DataLoader(
        _ErrorsAsItems(batches),
        batch_size=None,
        sampler=numbers,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_leave_signals_to_the_rank,
    )
    for batch in loader:
        if isinstance(batch, UserError):
            batch.on_every_rank = False
            raise batch
        yield batch.to(device)


def _leave_signals_to_the_rank(_: int) -> None:
    """A launcher signals workers as well; a rank that is asked to stop still needs its own until the step's end."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
