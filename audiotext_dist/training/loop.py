"""A training run from beginning to end, for any recipe.

``train`` joins the processes, goes on from a checkpoint if asked to, and runs the steps that are left: batch,
learning rate, update, log, checkpoint, evaluate.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from audiotext_dist import configuration, storage
from audiotext_dist.data.bad_samples import BadSampleCount
from audiotext_dist.data.cache import ReadCounts
from audiotext_dist.data.loader import Batch, TrainingBatches, in_step, iterate
from audiotext_dist.distributed import World, barrier, min_and_max_over_ranks, sums_over_ranks
from audiotext_dist.evaluation import report
from audiotext_dist.evaluation.retrieval import RetrievalResult, evaluate_set
from audiotext_dist.training import checkpoint
from audiotext_dist.training.checkpoint import Progress
from audiotext_dist.training.engine import Engine, start_process_group
from audiotext_dist.training.optim import build_optimizer, schedule, set_learning_rates
from audiotext_dist.training.prepare import Prepared
from audiotext_dist.training.step import StepResult, check_finite_weights, train_step
from audiotext_dist.training.tracker import Tracker, read_metrics

_log = logging.getLogger(__name__)


def train(prepared: Prepared) -> list[RetrievalResult]:
    """Train to the end; the last evaluation's results."""
    recipe, world = prepared.recipe, prepared.world
    run_dir = Path(recipe.run_dir)
    start_process_group(world)
    model = prepared.model.to(world.device)
    engine = Engine(
        model,
        build_optimizer(model, recipe.optim, global_batch_size=recipe.training.global_batch_size),
        recipe.engine,
        micro_batch_size=recipe.training.global_batch_size // world.size // recipe.num_micro_batches(world.size),
        num_micro_batches=recipe.num_micro_batches(world.size),
        gradient_clipping=recipe.optim.gradient_clipping,
    )
    progress = prepared.start()
    if recipe.training.resume == "auto":
        progress = _resume(engine, run_dir, progress, world)
    # Only now is it sure that the folder's earlier run, if any, goes on as this recipe says.
    if world.is_main:
        storage.write_bytes(str(run_dir / checkpoint.RECIPE_FILE), configuration.to_yaml(recipe).encode())
    tracker = Tracker(
        recipe.tracker,
        run_dir,
        name=recipe.name,
        recipe=recipe,
        start_step=progress.step,
        wandb_id=progress.wandb_id,
        is_main=world.is_main,
    )
    results = _Run(prepared, engine, tracker, progress).to_the_end()
    if world.is_main:
        report.draw_loss(read_metrics(run_dir), run_dir)
        tracker.close()
    return results


def _resume(engine: Engine, run_dir: Path, start: Progress, world: World) -> Progress:
    newest = checkpoint.find_newest_whole(run_dir, world)
    if newest is None:
        return start
    progress = checkpoint.load(engine, newest, start, world)
    if world.is_main:
        checkpoint.remove_newer(newest)
        _log.info("resumed from %s: step %d, epoch %d", newest, progress.step, progress.epoch + 1)
    return progress


class _Run:
    """The epochs of one run, and where it stands in them."""

    def __init__(self, prepared: Prepared, engine: Engine, tracker: Tracker, progress: Progress) -> None:
        self._prepared, self._engine, self._tracker = prepared, engine, tracker
        self._recipe, self._world = prepared.recipe, prepared.world
        self._start, self._steps_an_epoch = progress, progress.steps_an_epoch
        self._num_steps = self._steps_an_epoch * self._recipe.training.num_epochs
        self._last_step = min(self._num_steps, self._recipe.training.max_steps or self._num_steps)
        self._step = self._saved_step = progress.step
        self._evaluated_step, self._results = -1, list[RetrievalResult]()
        self._bad_samples = BadSampleCount(self._recipe.data.max_bad_share, self._world)

    def to_the_end(self) -> list[RetrievalResult]:
        """Every step that is left, then the last checkpoint and evaluation."""
        recipe, model = self._recipe, self._prepared.model
        with tqdm(
            total=self._last_step,
            initial=self._step,
            unit="step",
            dynamic_ncols=True,
            disable=not (self._world.is_main and sys.stderr.isatty()),
        ) as bar:
            meter = _Meter(self._world, recipe.training.global_batch_size)
            self._engine.train()
            for batch in in_step(meter.waiting_for(self._batches())):
                share = schedule(
                    self._step,
                    warmup_steps=round(recipe.optim.warmup_epochs * self._steps_an_epoch),
                    num_steps=self._num_steps,
                    final_share=recipe.optim.final_lr_share,
                )
                set_learning_rates(self._engine.param_groups, share)
                result = train_step(self._engine, model, batch, self._step, recipe.loss, recipe.training.autocast_dtype)
                self._step += 1
                self._bad_samples.add(len(batch.keys), batch.bad_samples)
                if self._step % recipe.tracker.every_steps == 0 or self._step == self._last_step:
                    self._log_step(result, meter, bar)
                bar.update()
                with meter.stopped():
                    if self._is_due(recipe.checkpoint.every_epochs, recipe.checkpoint.every_steps):
                        self._save()
                    if self._is_due(recipe.evaluation.every_epochs):
                        self._evaluate()
        self._save()
        return self._evaluate()

    def _is_due(self, every_epochs: int, every_steps: int | None = None) -> bool:
        return self._step % (every_epochs * self._steps_an_epoch) == 0 or bool(
            every_steps and self._step % every_steps == 0
        )

    def _batches(self) -> Iterator[Batch]:
        prepared, data = self._prepared, self._recipe.data
        text = prepared.model.text
        batches = TrainingBatches(
            prepared.train_sets,
            prepared.plan,
            data.decode_config(
                audio="audio" in self._recipe.task,
                frames="random" if "image" in self._recipe.task else "none",
                frame_pixels=prepared.model.frame_pixels,
                random=True,
            ),
            seed=self._recipe.training.seed,
            world=self._world,
            tokenize=None if text is None or data.caption_features is not None else text.tokenize,
            features=prepared.train_features,
            cache=data.node_cache(),
        )
        steps_left = range(self._step, self._last_step)
        return iterate(batches, steps_left, num_workers=data.num_workers, device=self._world.device)

    def _log_step(self, result: StepResult, meter: _Meter, bar: tqdm) -> None:
        epoch = self._step / self._steps_an_epoch
        read = meter.read()
        learning_rates = [group["lr"] for group in self._engine.param_groups]
        self._tracker.log(
            self._step,
            {
                "train/loss": result.loss,
                **{f"train/{name}": value for name, value in result.figures.items()},
                "train/logit_scale": result.logit_scale,
                "train/epoch": epoch,
                "optim/weight_lr": learning_rates[0],
                "optim/bias_lr": learning_rates[-1],
                **{f"data/{name}": value for name, value in read.items()},
                **{f"data/{name}": count for name, count in self._bad_samples.check().items()},
            },
        )
        shown = (
            f"epoch {epoch:.1f}, loss {result.loss:.3f}, lr {learning_rates[0]:.1e}, "
            f"{read['clips_per_second']:.0f} clips/s, {read['read_bytes_per_second'] / 1e6:.1f} MB/s, "
            f"waiting {100 * read['waiting_share_max']:.0f}%"
        )
        if read["cache_hits"] + read["cache_misses"] + read["prefetch_waits"]:
            shown += f", fetched {read['fetched_bytes_per_second'] / 1e6:.1f} MB/s, waits {read['prefetch_waits']:.0f}"
        bar.set_postfix_str(shown, refresh=False)
        if bar.disable and self._world.is_main:
            _log.info("step %d of %d, %s", self._step, self._last_step, shown)

    def _save(self) -> None:
        if self._saved_step == self._step:
            return
        self._saved_step = self._step
        check_finite_weights(self._prepared.model, self._step)
        epoch, batch = divmod(self._step, self._steps_an_epoch)
        checkpoint.save(
            self._engine,
            self._prepared.model,
            dataclasses.replace(
                self._start, step=self._step, epoch=epoch, batch=batch, wandb_id=self._tracker.wandb_id
            ),
            Path(self._recipe.run_dir),
            self._world,
            recipe_yaml=configuration.to_yaml(self._recipe),
            keep_last=self._recipe.checkpoint.keep_last,
        )

    def _evaluate(self) -> list[RetrievalResult]:
        if self._evaluated_step == self._step:
            return self._results
        self._evaluated_step = self._step
        recipe = self._recipe
        self._results = [
            evaluate_set(
                self._prepared.model,
                recipe.task,
                shards,
                recipe.data,
                recipe.data.validation[name],
                set_name=name,
                batch_size=recipe.evaluation.batch_size,
                world=self._world,
                features=self._prepared.validation_features[name],
            )
            for name, shards in self._prepared.validation_sets.items()
        ]
        if self._results:
            flat = {key: value for result in self._results for key, value in report.flat_metrics(result).items()}
            self._tracker.log(self._step, flat)
            if self._world.is_main:
                report.write_results(self._results, Path(recipe.run_dir))
        barrier()
        return self._results


class _Meter:
    """What the data cost since it was last read: clips a second, share of time that ranks wait, bytes, cache."""

    def __init__(self, world: World, global_batch_size: int) -> None:
        self._world, self._global_batch_size = world, global_batch_size
        self._start = time.perf_counter()
        self._waited_seconds = 0.0
        self._num_batches = 0
        self._counts = ReadCounts()

    def waiting_for(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, each wait measured."""
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self._waited_seconds += time.perf_counter() - before
            self._num_batches += 1
            self._counts += batch.counts
            yield batch

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """What happens inside counts as no time."""
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before

    def read(self) -> dict[str, float]:
        """Name -> figure over all ranks; starts anew. Bytes are those of the workers, which are some batches ahead."""
        now = time.perf_counter()
        seconds = now - self._start
        least, greatest = min_and_max_over_ranks(self._waited_seconds / seconds, self._world.device)
        sums = sums_over_ranks(dataclasses.astuple(self._counts), self._world.device)
        counts = ReadCounts(*sums)
        figures = {
            "clips_per_second": self._num_batches * self._global_batch_size / seconds,
            "waiting_share_min": least,
            "waiting_share_max": greatest,
            "read_bytes_per_second": counts.bytes_read / seconds,
            "fetched_bytes_per_second": counts.bytes_fetched / seconds,
            "cache_hits": counts.cache_hits,
            "cache_misses": counts.cache_misses,
            "prefetch_waits": counts.prefetch_waits,
        }
        self._start, self._waited_seconds, self._num_batches, self._counts = now, 0.0, 0, ReadCounts()
        return figures
