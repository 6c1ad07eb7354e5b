"""One pass over finished shards, a shard a task, on the processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from audiotext_dist import storage
from audiotext_dist.data.cache import NodeCache
from audiotext_dist.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def default_num_workers() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def map_shards(function: Callable[[Item], Result], items: Sequence[Item], num_workers: int) -> Iterator[Result]:
    """``map(function, items)``, in the order of the items, with progress on stderr. 1 worker: this process.

    Raises:
        UserError: a worker was killed.
    """
    progress = tqdm(total=len(items), unit=" shards", disable=None)
    with progress:
        if num_workers == 1:
            for item in items:
                yield function(item)
                progress.update()
            return
        try:
            # Not fork: the progress bar and torch have threads.
            with ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn")) as pool:
                for result in pool.map(function, items):
                    yield result
                    progress.update()
        except BrokenProcessPool:
            raise UserError("a worker process was killed (out of memory?): give fewer num_workers") from None


@contextmanager
def fresh_local_copy(path: str) -> Iterator[Path]:
    """The shard as a local file; a remote one is fetched now, whatever the cache holds, and removed after."""
    if not storage.is_remote(path):
        yield Path(path.removeprefix("file://"))
        return
    with tempfile.TemporaryDirectory() as folder:
        descriptor = NodeCache(folder=folder).open(path)
        try:
            yield Path(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
