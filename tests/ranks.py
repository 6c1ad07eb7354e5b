"""Run a function, or one of our commands, on real gloo ranks, one process each."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from audiotext_dist.errors import run_for_people

# One process imports what most ranks need, some eight seconds of CPU; each rank is forked from it.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["audiotext_dist.training.recipe", "launch.pretrain"])
_LIMIT_SECONDS = 600
_COLLECTIVE_SECONDS = 300


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


def run_command_on_ranks(script: str, words: Sequence[str], world_size: int) -> subprocess.CompletedProcess[str]:
    """``launch/SCRIPT.py words`` on so many ranks as the launcher would start them, without its own two imports."""
    common = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        "CUDA_VISIBLE_DEVICES": "",
    }
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        ranks = [
            PROCESSES.Process(
                target=_command,
                args=(script, words, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, outputs),
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(_LIMIT_SECONDS)
            process.kill()  # where it hangs
            process.join()
        code = next((process.exitcode for process in ranks if process.exitcode), 0)
        said = [output.read_text() for output in outputs]
    return subprocess.CompletedProcess([script, *words], code, *said)


def _command(script: str, words: Sequence[str], environment: dict[str, str], outputs: Sequence[Path]) -> None:
    for number, output in enumerate(outputs, start=1):
        os.dup2(os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [f"{script}.py", *words]
    run_for_people(importlib.import_module(f"launch.{script}").main)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


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
    # A collective that the others never come to fails, in the place of waiting.
    timeout = timedelta(seconds=_COLLECTIVE_SECONDS)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=timeout)
    try:
        results.put((rank, function(rank, *args)))
    except BaseException:  # that of pytest.raises is no Exception
        results.put((rank, _Failure(traceback.format_exc())))
    dist.destroy_process_group()
