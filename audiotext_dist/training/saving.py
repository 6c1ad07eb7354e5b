"""Which checkpoints a run writes, keeps, and copies to a store."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import nn

from audiotext_dist import storage
from audiotext_dist.distributed import World, barrier, from_main, raise_together
from audiotext_dist.errors import UserError, require_positive
from audiotext_dist.training import checkpoint, checkpoint_folder
from audiotext_dist.training.checkpoint import Progress
from audiotext_dist.training.checkpoint_folder import BEST_FILE, CHECKPOINTS, best_of, name_of, named_checkpoints
from audiotext_dist.training.upload import Uploader, fetch_newest

if TYPE_CHECKING:
    from audiotext_dist.training.engine import Engine

_log = logging.getLogger(__name__)
_TURN_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written, how many stay, and where copies go.

    best_metric: such as ``validation/NAME/audio->text/R@1``; the checkpoint where it is highest (or lowest,
    by best_is) stays beside the last ones, and every evaluation comes with a checkpoint.
    upload_to: ``s3://bucket/folder`` of this run alone; a run on an empty disk goes on from there.
    last_copy_seconds: so long a run that was asked to stop waits for its last copy; give more where a node's disk is
    lost with it, and the signal comes early enough.
    """

    every_epochs: int = 1
    every_steps: int | None = None
    keep_last: int = 2
    best_metric: str | None = None
    best_is: Literal["highest", "lowest"] = "highest"
    upload_to: str | None = None
    last_copy_seconds: float = 10.0

    def __post_init__(self) -> None:
        if self.upload_to is not None:
            if not storage.is_remote(self.upload_to):
                raise UserError(f"checkpoint.upload_to={self.upload_to} is no URL: give s3://bucket/folder")
            storage.check_no_credentials(self.upload_to)
        require_positive(self, "checkpoint", "every_epochs", "every_steps", "keep_last", "last_copy_seconds")


class Saver:
    """Writes a run's checkpoints; every rank calls each method."""

    def __init__(
        self, config: CheckpointConfig, engine: Engine, model: nn.Module, run_dir: Path, world: World, recipe_yaml: str
    ) -> None:
        self._config, self._engine, self._model = config, engine, model
        self._run_dir, self._world, self._recipe_yaml = run_dir, world, recipe_yaml
        if world.is_main:
            # What a killed run left half written or half fetched: here no save has begun, and the fetch is over.
            for left in (run_dir / CHECKPOINTS).glob(".step-*.partial"):
                shutil.rmtree(left, ignore_errors=True)
        self._uploader = None
        if config.upload_to is not None and world.is_main:
            (run_dir / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            self._uploader = Uploader(config.upload_to, run_dir / CHECKPOINTS)

    def save(self, progress: Progress) -> bool:
        """Write a checkpoint, and remove what is no longer kept; False where the disk refuses."""
        saved = checkpoint.save(
            self._engine, self._model, progress, self._run_dir, self._world, recipe_yaml=self._recipe_yaml
        )
        if saved is not None and self._world.is_main:
            self._remove_old()
            if self._uploader is not None:
                self._uploader.put(saved, kept_names(self._run_dir, self._config.keep_last))
        return saved is not None

    def note_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Remember this step's checkpoint if it is the best so far."""
        if self._world.is_main:
            note_metric(self._run_dir, step, metrics, self._config)
            self._remove_old()

    def finish(self, *, in_a_hurry: bool = False) -> None:
        """Wait for the last copy, in turns: no rank may wait for another as long as that can take."""
        deadline = time.monotonic() + (self._config.last_copy_seconds if in_a_hurry else math.inf)
        while from_main(self._waits_for_copy(deadline)):
            pass

    def _waits_for_copy(self, deadline: float) -> bool:
        """On the main rank: whether the last copy is still to come, after a second's wait."""
        if self._uploader is None or self._uploader.finish(_TURN_SECONDS):
            return False
        if time.monotonic() < deadline:
            return True
        _log.warning("the last checkpoint is not at %s yet: the disk has it", self._config.upload_to)
        return False

    def _remove_old(self) -> None:
        for old in named_checkpoints(self._run_dir):
            if old.name not in kept_names(self._run_dir, self._config.keep_last):
                shutil.rmtree(old, ignore_errors=True)


def fetch(config: CheckpointConfig, run_dir: Path, world: World) -> Path | None:
    """Bring a newer checkpoint than the disk's from the store; every rank calls it.

    Raises:
        UserError: the store cannot be read: to start anew would throw the run away.
    """
    fetched, error = None, None
    if config.upload_to is not None and world.is_main:
        newest = checkpoint_folder.newest_whole(run_dir)
        try:
            fetched = fetch_newest(
                config.upload_to, run_dir / CHECKPOINTS, newer_than="" if newest is None else newest.name
            )
        except (UserError, OSError) as met:
            error = UserError(f"checkpoint.upload_to cannot be read ({met}): mend that, or resume without it")
    raise_together(error)
    barrier()
    return fetched


def resume(
    config: CheckpointConfig, engine: Engine, model: nn.Module, run_dir: Path, start: Progress, world: World
) -> Progress:
    """Go on from the newest whole checkpoint, here or in the store; ``start`` where there is none."""
    fetch(config, run_dir, world)
    newest = checkpoint.find_newest_whole(run_dir, world)
    if newest is None:
        return start
    progress = checkpoint.load(engine, model, newest, start)
    if world.is_main:
        checkpoint.set_aside_newer(newest)
        _log.info("resumed from %s: step %d, epoch %d", newest, progress.step, progress.epoch + 1)
        if progress.world_size != world.size:
            _log.info("%d processes go on where %d stopped", world.size, progress.world_size)
    return progress


def kept_names(run_dir: Path, keep_last: int) -> set[str]:
    """The checkpoints that stay: the last ones, and the best."""
    best = best_of(run_dir)
    last = [found.name for found in named_checkpoints(run_dir)[:keep_last]]
    return {*last, *([] if best is None else [str(best["name"])])}


def note_metric(run_dir: Path, step: int, metrics: Mapping[str, float], config: CheckpointConfig) -> None:
    """Remember the checkpoint of this step if its metric is the best so far, which NaN never is; on the main rank."""
    if config.best_metric is None or not (run_dir / CHECKPOINTS / name_of(step)).is_dir():
        return
    value, best = metrics[config.best_metric], best_of(run_dir)
    sign = 1 if config.best_is == "highest" else -1
    beats = (
        best is None
        or best["metric"] != config.best_metric
        or math.isnan(float(best["value"]))
        or sign * value > sign * float(best["value"])
    )
    if beats and not math.isnan(value):
        content = {"name": name_of(step), "metric": config.best_metric, "value": value}
        try:
            storage.write_bytes(str(run_dir / CHECKPOINTS / BEST_FILE), json.dumps(content).encode())
        except UserError as error:
            _log.warning("step %d is not remembered as the best (%s)", step, error)
