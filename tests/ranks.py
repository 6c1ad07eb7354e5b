"""Run a function on real gloo ranks, one process each."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# One process imports what most ranks need, some eight seconds of CPU; each rank is forked from it.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["launch.pretrain"])


def run_on_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """``function(rank, *args)`` in a process group; what each rank returned, in rank order."""
    results: Any = PROCESSES.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{Path(folder) / 'store'}"
        ranks = [
            PROCESSES.Process(target=_rank, args=(function, rank, world_size, store, results, dict(os.environ), args))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        found = dict(results.get() for _ in ranks)
        for process in ranks:
            process.join()
    for value in found.values():
        if isinstance(value, _Failure):
            raise AssertionError(value.text)
    return [found[rank] for rank in range(world_size)]


class _Failure:
    def __init__(self, text: str) -> None:
        self.text = text


def _rank(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    store: str,
    results: Any,
    environment: dict[str, str],
    args: tuple[Any, ...],
) -> None:
    # The caller's, in the place of that in which the first test of all started.
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    try:
        results.put((rank, function(rank, *args)))
    except Exception:
        results.put((rank, _Failure(traceback.format_exc())))
    dist.destroy_process_group()
