"""From a plan to batches: what a DataLoader worker does, for training and for evaluation.

``TrainingBatches`` makes, for a step of the run, this rank's part of its global batch: the plan says which rows,
``decode`` reads them (and ``features`` what frozen encoders said of them), a row that is no good is replaced by the
plan's next one and reported. ``workers.iterate`` runs that over all steps that are left; an epoch's end is no stop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial

from torch.utils.data import Dataset

from audiotext_dist import storage
from audiotext_dist.data.bad_samples import BadSample, BadSampleError
from audiotext_dist.data.batch import Batch, Tokenize, collate
from audiotext_dist.data.batch_memory import BatchMemory
from audiotext_dist.data.cache import NodeCache
from audiotext_dist.data.decode import Clip, ClipArrays, DecodeConfig, decode_clip
from audiotext_dist.data.features import Features
from audiotext_dist.data.plan import Plan, Slot, evaluation_slots
from audiotext_dist.data.prefetch import Prefetcher, each_in_turn
from audiotext_dist.data.shard import Shard
from audiotext_dist.data.shard_reader import ShardReader
from audiotext_dist.distributed import World
from audiotext_dist.errors import UserError

MAX_REPLACEMENTS = 64
NO_FEATURES = Features()


class TrainingBatches(Dataset[Batch]):
    """This rank's part of every global batch, by the step of the run, counted from 0.

    Args:
        plan_of: the plan of an epoch; every epoch has the same number of batches.
        num_lone_epochs: in so many epochs at first, only the frame that stands for a clip alone is decoded.
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
        num_lone_epochs: int = 0,
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
        self._decode_alone, self._num_lone_epochs = replace(decode, frames="random"), num_lone_epochs
        ahead = partial(_shards_ahead, self._plan_of, world)
        self._prefetcher = Prefetcher(
            cache,
            self._shards,
            ahead,
            max_bytes=cache.max_bytes // world.local_size,
            beside=features.remote_files,
            has_remote=features.has_remote,
        )

    def __getitem__(self, step: int) -> Batch:
        """The batch; every slot is filled.

        Raises:
            UserError: so many samples in a row cannot be decoded that the set must be broken.
        """
        self._reader.close_removed()
        self._features.close_removed()
        self._prefetcher.advance(step)
        bad_samples: list[BadSample] = []
        arrays = self.memory.take()
        clips = [
            self._decode_or_replace(step, place, slot, arrays.clip(place), bad_samples)
            for place, slot in enumerate(self._own_slots(step))
        ]
        batch = collate(clips, arrays, bad_samples, self._tokenize)
        batch.counts = self._reader.take_counts()
        batch.counts += self._features.take_counts()
        batch.counts += self._prefetcher.take_counts()
        return batch

    def _own_slots(self, step: int) -> list[Slot]:
        epoch, number = divmod(step, self._num_batches)
        return self._plan_of(epoch).batch(number, rank=self._world.rank, world_size=self._world.size)

    def _decode_or_replace(
        self, step: int, place: int, slot: Slot, into: ClipArrays, bad_samples: list[BadSample]
    ) -> Clip:
        epoch = step // self._num_batches
        decode = self._decode_alone if epoch < self._num_lone_epochs else self._decode
        for ahead in range(1, MAX_REPLACEMENTS + 1):
            shard = self._shards[slot.shard]
            key = shard.index.keys[slot.row]
            try:
                clip = decode_clip(self._reader, key, slot, decode, seed=self._seed, epoch=epoch, into=into)
                needs_caption = self._tokenize is not None or self._features.captions is not None
                if needs_caption and clip.caption_number < 0:
                    raise BadSampleError("it has no caption", "no_caption")
                return self._features.added_to(clip, slot).with_drawn_caption()
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
        slots = evaluation_slots([shard.num_samples for shard in shards], rank=world.rank, world_size=world.size)
        self._batches = [slots[start : start + batch_size] for start in range(0, len(slots), batch_size)]
        ahead = partial(each_in_turn, [[slot.shard for slot in batch] for batch in self._batches])
        self._prefetcher = Prefetcher(
            cache,
            shards,
            ahead,
            max_bytes=cache.max_bytes // world.local_size,
            beside=features.remote_files,
            has_remote=features.has_remote,
        )

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> Batch:
        """The batch; the last one may be shorter.

        Raises:
            UserError: a clip cannot be decoded; a silently smaller test set would not compare.
        """
        self._reader.close_removed()
        self._features.close_removed()
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
