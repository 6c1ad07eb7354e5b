"""Where the large arrays of batches lie: clips are decoded right into them.

1. Without workers each batch has arrays of its own.
2. With workers, each worker has a ring of such arrays in memory that it shares with the main process. It fills one
   after the other, again and again: memory that is new for each batch is faulted in page by page, on both sides, for
   a tenth of the time of decoding.
3. The main process copies a batch out of the ring before it asks for the next one.
"""

from __future__ import annotations

import mmap
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from audiotext_dist.data.decode import ClipArrays, DecodeConfig

# Batches that a DataLoader's worker makes before the main process has asked for them.
PREFETCH_FACTOR = 2
# One more: the batch that the main process copies out meanwhile.
_RING_LENGTH = PREFETCH_FACTOR + 1


class BatchArrays(NamedTuple):
    """waveform_BS int16 and frames_BLHWC uint8."""

    waveform_BS: NDArray[np.int16]
    frames_BLHWC: NDArray[np.uint8]

    def clip(self, place: int) -> ClipArrays:
        """Where one clip goes."""
        return ClipArrays(self.waveform_BS[place], self.frames_BLHWC[place])

    def first(self, num_clips: int, num_frames: int) -> BatchArrays:
        """The first clips of the batch, and of each so many pictures, where it has any."""
        return BatchArrays(self.waveform_BS[:num_clips], self.frames_BLHWC[:num_clips, :num_frames])

    def copy(self) -> BatchArrays:
        """The same in memory of its own."""
        return BatchArrays(self.waveform_BS.copy(), self.frames_BLHWC.copy())


class BatchMemory:
    """The arrays of every batch of up to ``num_clips`` clips."""

    def __init__(self, num_clips: int, config: DecodeConfig) -> None:
        self._waveform_shape = (num_clips, config.clip_samples)
        self._frames_shape = (num_clips, config.num_pictures, config.frame_pixels, config.frame_pixels, 3)
        self._rings: list[list[BatchArrays]] = []
        self._num_taken = 0

    def share(self, num_workers: int) -> None:
        """Make a ring for each worker that will be forked from this process."""
        self._rings = [[self._shared() for _ in range(_RING_LENGTH)] for _ in range(num_workers)]

    def take(self) -> BatchArrays:
        """Arrays for the next batch, of any content."""
        worker = get_worker_info()
        if worker is None:
            return BatchArrays(np.empty(self._waveform_shape, np.int16), np.empty(self._frames_shape, np.uint8))
        self._num_taken += 1
        return self._rings[worker.id][self._num_taken % _RING_LENGTH]

    def taken_last(self) -> tuple[int, int]:
        """In a worker: its number, and the place in its ring of what it took last."""
        worker = get_worker_info()
        assert worker is not None
        return worker.id, self._num_taken % _RING_LENGTH

    def at(self, worker: int, place: int) -> BatchArrays:
        """In the main process: what a worker has filled; to be copied before the next batch is asked for."""
        return self._rings[worker][place]

    def _shared(self) -> BatchArrays:
        # Anonymous memory, not /dev/shm, of which a container has 64 MB.
        waveform, frames = (
            np.frombuffer(mmap.mmap(-1, max(1, int(np.prod(shape)) * bytes_each)), np.uint8)
            for shape, bytes_each in ((self._waveform_shape, 2), (self._frames_shape, 1))
        )
        return BatchArrays(
            waveform[: int(np.prod(self._waveform_shape)) * 2].view(np.int16).reshape(self._waveform_shape),
            frames[: int(np.prod(self._frames_shape))].reshape(self._frames_shape),
        )
