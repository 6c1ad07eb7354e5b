"""Checkpoints: complete or invisible.

    run_dir/checkpoints/step-00000100/
        model.safetensors     every weight of the model, readable without DeepSpeed
        ema.safetensors       moving averages of the trained weights, with training.ema_decay
        optimizer.safetensors what the optimizer holds of every parameter, whole
        progress.json         step, epoch, batch, order of the data, world size, W&B run
        recipe.yaml           the resolved recipe
        manifest.json         size and SHA-256 of every file above
    run_dir/checkpoints/latest          the newest one's name, moved last; for people and scripts
    run_dir/checkpoints/best.json       the best one's name and metric (saving.py)

Nothing in it depends on the number of processes or the ZeRO stage, so a run goes on under others. Random numbers
are drawn from the seed, the step and the rank, so they need no file.

A checkpoint is written as ``.step-...partial``, given its manifest, synced, and only then renamed; what a kill left
of one is removed when the run is started again. Loading goes through the checkpoints from the newest, and takes the
first that every rank finds whole; damaged newer ones are set aside as ``.step-...damaged`` by the run that goes on
from it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from audiotext_dist import storage
from audiotext_dist.data.sets import DataOrder
from audiotext_dist.distributed import World, from_main, gather_items
from audiotext_dist.errors import UserError
from audiotext_dist.training.checkpoint_folder import (
    CHECKPOINTS,
    MANIFEST,
    RECIPE_FILE,
    describe_files,
    is_whole,
    name_of,
    named_checkpoints,
)
from audiotext_dist.training.health import Health
from audiotext_dist.training.loss_scale import LossScale
from audiotext_dist.training.weights import EMA_FILE, MODEL_FILE, load_strictly, make_readable

if TYPE_CHECKING:
    from audiotext_dist.training.engine import Engine

_OPTIMIZER_FILE = "optimizer.safetensors"
_PROGRESS = "progress.json"
_POINTER = "latest"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands: ``step`` batches done; the next batch is number ``batch`` of ``epoch``.

    seed, global_batch_size, steps_an_epoch, optimizer, order: what fixes the meaning of those three; a run goes on only
    where they are the same. An older checkpoint tells nothing of the order. world_size: of the processes that wrote
    this; others may go on.
    """

    step: int
    epoch: int
    batch: int
    seed: int
    global_batch_size: int
    steps_an_epoch: int
    world_size: int
    optimizer: str
    order: DataOrder | None = None
    wandb_id: str | None = None
    health: Health = field(default_factory=Health)
    loss_scale: LossScale | None = None

    def check_fits(self, other: Progress, where: str) -> None:
        """Raise ``UserError`` unless the other run reads the same batches, and updates in the same way."""
        others = other._settings()
        for what, before in self._settings().items():
            now = others.get(what, before)
            if before != now:
                raise UserError(f"{where} was made with {what} {before}, not {now}: give the same, or a new run_dir")

    def _settings(self) -> dict[str, object]:
        """What a run that goes on must share, each by the name that a user knows."""
        return {
            "training.seed": self.seed,
            "training.global_batch_size": self.global_batch_size,
            "the number of batches an epoch (its data sets and weights)": self.steps_an_epoch,
            **({} if self.order is None else self.order.settings()),
            "optim.name": self.optimizer,
        }


def save(
    engine: Engine,
    model: nn.Module,
    progress: Progress,
    run_dir: Path,
    world: World,
    *,
    recipe_yaml: str,
) -> Path | None:
    """Write a checkpoint; every rank calls it, and returns when it is complete.

    None where the disk refused it, which a warning tells: nothing of it is left, and earlier ones are as they were.
    """
    optimizer_state = engine.optimizer_state(on_this_rank=world.is_main)
    saved: Path | None = None
    if world.is_main:
        weights = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
        files = {MODEL_FILE: weights, _OPTIMIZER_FILE: optimizer_state}
        if engine.ema is not None:
            files[EMA_FILE] = engine.ema.state()
        partial = run_dir / CHECKPOINTS / f".{name_of(progress.step)}.partial"
        try:
            _write(partial, files, progress, recipe_yaml)
            saved = _give_name(partial, run_dir)
        except (OSError, UserError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            _log.warning(
                "no checkpoint of step %d (%s): the run goes on, make room in %s", progress.step, error, run_dir
            )
    return from_main(saved)


def _write(
    partial: Path,
    files: dict[str, dict[str, torch.Tensor]],
    progress: Progress,
    recipe_yaml: str,
) -> None:
    """All files of a checkpoint, the manifest of what the disk then holds last."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file, tensors in files.items():
        save_file(tensors, partial / file)
        make_readable(partial / file)
        storage.sync(partial / file)
    storage.write_bytes(str(partial / _PROGRESS), json.dumps(dataclasses.asdict(progress)).encode())
    storage.write_bytes(str(partial / RECIPE_FILE), recipe_yaml.encode())
    storage.write_bytes(str(partial / MANIFEST), json.dumps(describe_files(partial), indent=1).encode())
    storage.sync(partial)


def _give_name(partial: Path, run_dir: Path) -> Path:
    """From here on the checkpoint is to be seen, after a power loss as well: older ones may go."""
    named = partial.with_name(partial.name.removeprefix(".").removesuffix(".partial"))
    shutil.rmtree(named, ignore_errors=True)
    partial.rename(named)
    try:
        storage.sync(named.parent)
    except OSError:
        shutil.rmtree(named, ignore_errors=True)
        raise
    try:
        storage.write_bytes(str(run_dir / CHECKPOINTS / _POINTER), named.name.encode())
    except UserError:
        _log.warning("the disk is full: %s is whole, but %s does not name it", named, _POINTER)
    return named


def find_newest_whole(run_dir: Path, world: World) -> Path | None:
    """The newest checkpoint whose every file has the size and digest of its manifest, on all ranks; None without any.

    Each rank checks the digests of its share of the files.

    Raises:
        UserError: there are some, but none is whole: to start anew would throw the run away.
    """
    candidates: list[Path] = from_main(named_checkpoints(run_dir) if world.is_main else None)
    for candidate in candidates:
        refused_by = [rank for rank, is_whole in enumerate(gather_items(is_whole(candidate, world))) if not is_whole]
        if not refused_by:
            return candidate
        if world.is_main:
            _log.warning("%s is not whole, says rank %s: looking for an older one", candidate, refused_by[0])
    if candidates:
        raise UserError(
            f"no checkpoint in {run_dir / CHECKPOINTS} is whole on every rank: let all nodes see run_dir, or start "
            "under a new one"
        )
    return None


def load(engine: Engine, model: nn.Module, checkpoint: Path, start: Progress) -> Progress:
    """Bring model and optimizer to where the checkpoint stands; every rank calls it. Rates stay the recipe's own.

    Args:
        start: what this run would start with.

    Raises:
        UserError: the checkpoint is of a run with other batches or towers.
    """
    progress = read_progress(checkpoint)
    progress.check_fits(start, str(checkpoint))
    load_strictly(model, load_file(checkpoint / MODEL_FILE), str(checkpoint))
    engine.load_optimizer_state(load_file(checkpoint / _OPTIMIZER_FILE))
    if engine.ema is not None:
        averages = checkpoint / EMA_FILE
        engine.ema.load(load_file(averages) if averages.is_file() else {})
    if engine.loss_scale is not None and progress.loss_scale is not None:
        engine.loss_scale = progress.loss_scale
    return dataclasses.replace(progress, order=start.order)


def set_aside_newer(checkpoint: Path) -> None:
    """Hide the checkpoints after this one, which were found damaged; else they would outlive whole ones.

    They are not removed: a disk that could not be read for a moment makes a whole one look damaged.
    """
    for other in checkpoint.parent.glob("step-*"):
        if other.name > checkpoint.name:
            hidden = other.with_name(f".{other.name}.damaged")
            shutil.rmtree(hidden, ignore_errors=True)
            other.rename(hidden)
            _log.warning("%s is set aside as %s: remove it when it is of no use to you", other, hidden.name)


def read_progress(checkpoint: Path) -> Progress:
    """Where the checkpoint's run stood."""
    try:
        found = json.loads((checkpoint / _PROGRESS).read_text())
        health, scale, order = found.pop("health"), found.pop("loss_scale", None), found.pop("order", None)
        return Progress(
            **found,
            health=Health(**{**health, "recent_losses": tuple(health["recent_losses"])}),
            loss_scale=None if scale is None else LossScale(**scale),
            order=None if order is None else DataOrder(**{**order, "set_weights": tuple(order["set_weights"])}),
        )
    except (TypeError, ValueError, KeyError, AttributeError):
        raise UserError(f"{checkpoint} is of another version of this program: start under a new run_dir") from None
