"""Run a function on real gloo ranks, one process each."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_on_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """``function(rank, *args)`` in a process group; what each rank returned, in rank order."""
    context = multiprocessing.get_context("spawn")
    results: Any = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{Path(folder) / 'store'}"
        ranks = [
            context.Process(target=_rank, args=(function, rank, world_size, store, results, args))
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
    function: Callable[..., Any], rank: int, world_size: int, store: str, results: Any, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    try:
        results.put((rank, function(rank, *args)))
    except Exception:
        results.put((rank, _Failure(traceback.format_exc())))
    dist.destroy_process_group()
