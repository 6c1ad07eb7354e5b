"""Every row of some shards in order, in batches: what a job reads that writes a row for each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from torch.utils.data import Dataset

from audiotext_dist import storage
from audiotext_dist.data.bad_samples import BadSample, BadSampleError
from audiotext_dist.data.batch import Batch, collate
from audiotext_dist.data.batch_memory import BatchMemory
from audiotext_dist.data.cache import NodeCache
from audiotext_dist.data.decode import Clip, ClipArrays, DecodeConfig, decode_clip
from audiotext_dist.data.plan import Slot
from audiotext_dist.data.prefetch import Prefetcher, each_in_turn
from audiotext_dist.data.sample import ClipMetadata
from audiotext_dist.data.shard import Shard
from audiotext_dist.data.shard_reader import ShardReader
from audiotext_dist.distributed import World


class RowBatches(Dataset[Batch]):
    """Every row of some shards, in order; no batch holds rows of two shards.

    A row that does not decode stands there as a blank clip, and is told among the bad samples.
    """

    def __init__(
        self, shards: Sequence[Shard], decode: DecodeConfig, batch_size: int, *, cache: NodeCache, world: World
    ) -> None:
        self._shards, self._decode = shards, decode
        self.memory = BatchMemory(batch_size, decode)
        self._reader = ShardReader(shards, cache, verify=decode.verify)
        self.rows = [
            (number, range(start, min(start + batch_size, shard.num_samples)))
            for number, shard in enumerate(shards)
            for start in range(0, shard.num_samples, batch_size)
        ]
        ahead = partial(each_in_turn, [[number] for number, _ in self.rows])
        self._prefetcher = Prefetcher(cache, shards, ahead, max_bytes=cache.max_bytes // world.local_size)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Batch:
        """The batch; its rows are ``rows[number]``."""
        self._reader.close_removed()
        self._prefetcher.advance(number)
        bad_samples: list[BadSample] = []
        shard, rows = self.rows[number]
        arrays = self.memory.take()
        clips = [
            self._decode_or_blank(Slot(shard=shard, row=row), arrays.clip(place), bad_samples)
            for place, row in enumerate(rows)
        ]
        return collate(clips, arrays, bad_samples, None)

    def _decode_or_blank(self, slot: Slot, into: ClipArrays, bad_samples: list[BadSample]) -> Clip:
        shard = self._shards[slot.shard]
        key = shard.index.keys[slot.row]
        try:
            return decode_clip(self._reader, key, slot, self._decode, seed=0, epoch=0, into=into)
        except BadSampleError as error:
            bad_samples.append(BadSample(storage.public_name(shard.path), key, error.kind, str(error)))
            return _blank_clip(key, self._decode, into)


def _blank_clip(key: str, decode: DecodeConfig, into: ClipArrays) -> Clip:
    """Silence and black frames, for a row that has nothing else."""
    into.waveform_S[:], into.frames_LHWC[:] = 0, 0
    num_frames = decode.num_frames if decode.frames == "all" else 0
    return Clip(
        key=key,
        metadata=ClipMetadata(text=[], recording="", dataset="", duration=0.0, sample_rate=0),
        waveform=into.waveform_S,
        num_valid_samples=0,
        frames=into.frames_LHWC,
        frame_numbers=list(range(num_frames)),
        lone_frame=0,
        mask_uniforms=np.zeros(4, np.float32),
        caption_number=-1,
    )
