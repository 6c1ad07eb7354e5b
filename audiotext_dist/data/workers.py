"""Batches made ahead by plain DataLoader workers, which live as long as the run."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import signal
import threading
from collections.abc import Iterator
from functools import partial
from multiprocessing.util import Finalize
from typing import Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from audiotext_dist.data.batch import Batch
from audiotext_dist.data.batch_memory import PREFETCH_FACTOR, BatchMemory
from audiotext_dist.distributed import raise_together
from audiotext_dist.errors import UserError
from audiotext_dist.memory import keep_freed_memory

_ELSEWHERE = torch.empty(0, dtype=torch.uint8)


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
    with _told_to_end(num_workers) as told:
        # By name: it must outlast an error's way out of the loop, since it waits for its workers when it goes.
        items = iter(
            DataLoader(
                _InWorker(batches),
                batch_size=None,
                sampler=numbers,
                num_workers=num_workers,
                prefetch_factor=PREFETCH_FACTOR,
                multiprocessing_context="fork",  # by which the workers have the rings
                worker_init_fn=partial(_start_worker, told),
            )
        )
        for item in items:
            if isinstance(item, UserError):
                item.on_every_rank = False
                raise item
            batch, (worker, place) = item
            arrays = batches.memory.at(worker, place).first(*batch.frame_numbers_BL.shape).copy()
            yield dataclasses.replace(
                batch,
                waveform_BS=torch.from_numpy(arrays.waveform_BS),
                frames_BLHWC=torch.from_numpy(arrays.frames_BLHWC),
            )


@contextlib.contextmanager
def _told_to_end(num_workers: int) -> Iterator[int]:
    """Yield a descriptor from which each worker can read a byte as soon as no more batches are wanted.

    Else the end of the run would wait for a worker that is in the middle of its retries.
    """
    read_end, write_end = os.pipe()
    # Also when the process ends with batches left: before multiprocessing waits for its children.
    tell = Finalize(None, os.write, args=(write_end, bytes(num_workers)), exitpriority=0)
    try:
        yield read_end
    finally:
        tell()
        os.close(write_end)
        os.close(read_end)


def _end_when_told(told: int) -> None:
    os.read(told, 1)
    os._exit(0)  # it holds nothing that outlives it


def _start_worker(told: int, _: int) -> None:
    threading.Thread(target=_end_when_told, args=(told,), daemon=True).start()
    keep_freed_memory()
    # What came along by the fork, a large set's shards above all, is shared memory until the collector marks it.
    gc.freeze()
    # A launcher signals workers as well; a rank that is asked to stop still needs its own until the step's end.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


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
