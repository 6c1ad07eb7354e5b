"""Whole small runs in this process, or on gloo ranks, with faults put in where a test wants them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed as dist

from audiotext_dist.distributed import World
from audiotext_dist.errors import UserError
from audiotext_dist.training import loop
from audiotext_dist.training.preemption import StopRequest
from audiotext_dist.training.prepare import Prepared, prepare
from audiotext_dist.training.recipe import read_recipe
from audiotext_dist.training.tracker import read_metrics
from tests.clips import SAMPLE_RATE_HZ, make_sample, write_shards

SMALL = [
    "name=test",
    f"data.sample_rate_hz={SAMPLE_RATE_HZ}",
    "data.clip_seconds=1.0",
    "data.num_workers=0",
    "model.audio.name=tiny-audio-32",
    "model.audio.stride_frames=32",
    "model.audio.stride_bins=32",
    "model.audio.fbank.num_fbank_frames=98",
    "model.audio.fbank.time_mask_frames=20",
    "model.text.name=tiny-64",
    "model.text.frozen=false",
    "training.global_batch_size=12",
    "data.num_lanes=6",  # shared by 1, 2 or 3 ranks
    "training.num_epochs=10",
    "training.resume=auto",
    "optim.weight_lr=3e-3",
    "optim.gradient_clipping=1.0",
    "evaluation.every_epochs=100",
    "checkpoint.every_epochs=100",
    "tracker.every_steps=1",
    "tracker.wandb=disabled",
]


def write_training_set(folder: Path) -> Path:
    """48 clips in four shards: four global batches an epoch."""
    write_shards(folder, [[make_sample(12 * shard + row) for row in range(12)] for shard in range(4)])
    return folder


@dataclass(frozen=True, kw_only=True)
class Fault:
    """At a step of the run, counted from 1, one rank's loss or gradient becomes ``value``."""

    step: int
    rank: int
    kind: Literal["loss", "gradient"]
    value: float = float("nan")


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What a run left: its lines of metrics, the state of model and optimizer after each step, its last words."""

    metrics: list[dict[str, float]]
    states: list[str]
    error: str | None

    @property
    def losses(self) -> dict[int, float]:
        """Step -> loss, of the steps that had a finite one."""
        return {int(line["trainer/step"]): line["train/loss"] for line in self.metrics if "train/loss" in line}


def train_many(rank: int, runs: Sequence[tuple[Sequence[str], Sequence[Fault]]]) -> list[Ran]:
    """One rank's part of several runs, one after the other: starting the ranks costs more than the runs."""
    return [train_with_faults(rank, words, faults) for words, faults in runs]


def train_with_faults(rank: int, words: Sequence[str], faults: Sequence[Fault] = ()) -> Ran:
    """One rank's part of a run, or all of it where there is no process group."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    prepared = prepare(read_recipe([*SMALL, *words]), World.from_environment())
    states: list[str] = []
    with mock.patch.object(loop, "train_step", _faulty_step(prepared, rank, faults, states)):
        error = None
        try:
            loop.train(prepared, StopRequest())
        except UserError as met:
            error = str(met)
    return Ran(metrics=read_metrics(Path(prepared.recipe.run_dir)), states=states, error=error)


def _faulty_step(prepared: Prepared, rank: int, faults: Sequence[Fault], states: list[str]) -> Callable[..., Any]:
    real, now = loop.train_step, {"step": 0}

    def value_of(kind: str) -> float | None:
        hits = [each.value for each in faults if (each.step, each.rank, each.kind) == (now["step"], rank, kind)]
        return hits[0] if hits else None

    def spoil_output(_: Any, __: Any, sides: tuple[torch.Tensor, torch.Tensor]) -> Any:
        value = value_of("loss")
        return None if value is None else (sides[0] * value, sides[1])

    def spoil_gradient(gradient: torch.Tensor) -> torch.Tensor | None:
        value = value_of("gradient")
        return None if value is None else torch.full_like(gradient, value)

    prepared.model.register_forward_hook(spoil_output)
    words = next(part for part in prepared.model.text.modules() if isinstance(part, torch.nn.Embedding))
    words.weight.register_hook(spoil_gradient)

    def step(engine: Any, model: Any, *words: Any) -> Any:
        now["step"] = now["step"] + 1
        result = real(engine, model, *words)
        states.append(_digest(engine, model))
        return result

    return step


def _digest(engine: Any, model: Any) -> str:
    """Of every weight, average and number of the optimizer on this rank."""
    digest = hashlib.sha256()
    averages = {} if engine.ema is None else engine.ema.state()
    for tensor in [*model.state_dict().values(), *averages.values()]:
        digest.update(tensor.numpy().tobytes())
    for group in engine.param_groups:
        for parameter in group["params"]:
            digest.update(parameter.detach().numpy().tobytes())
            state = _torch_optimizer(engine).state.get(parameter, {})
            for key in sorted(state):
                digest.update(state[key].numpy().tobytes())
    return digest.hexdigest()


def _torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    return getattr(engine._optimizer, "optimizer", engine._optimizer)
