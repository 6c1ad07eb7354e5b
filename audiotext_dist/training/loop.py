"""A training run from beginning to end, for any recipe.

``train`` joins the processes, goes on from a checkpoint if asked to, and runs the steps that are left: batch,
learning rate, update, log, checkpoint, evaluate.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from audiotext_dist import configuration
from audiotext_dist.data.bad_samples import BadSampleCount
from audiotext_dist.data.workers import in_step
from audiotext_dist.distributed import any_over_ranks, barrier, from_main, gather_items
from audiotext_dist.errors import UserError
from audiotext_dist.evaluation import examples, report
from audiotext_dist.evaluation.embedded_clips import EvaluationStoppedError
from audiotext_dist.evaluation.retrieval import RetrievalResult
from audiotext_dist.training import checkpoint_folder
from audiotext_dist.training.checkpoint import Progress
from audiotext_dist.training.ema import Ema
from audiotext_dist.training.engine import Engine, start_process_group
from audiotext_dist.training.health import HealthWatch
from audiotext_dist.training.heartbeat import Heartbeat, beat_seconds
from audiotext_dist.training.loss_scale import LossScale
from audiotext_dist.training.meter import Meter
from audiotext_dist.training.optim import build_optimizer, named_learning_rates, schedule, set_learning_rates
from audiotext_dist.training.preemption import EXIT_PREEMPTED, StopRequest
from audiotext_dist.training.prepare import Prepared
from audiotext_dist.training.running_statistics import average_running_statistics
from audiotext_dist.training.saving import Saver, resume
from audiotext_dist.training.step import StepResult, check_finite_weights, seed_step, train_step
from audiotext_dist.training.step_log import progress_line, step_metrics
from audiotext_dist.training.tracker import Tracker, read_metrics

_log = logging.getLogger(__name__)


def train(prepared: Prepared, stop: StopRequest) -> list[RetrievalResult]:
    """Train to the end, or to where ``stop`` is made; the last evaluation's results.

    Raises:
        SystemExit: with ``EXIT_PREEMPTED``, where any rank was asked to stop; the last line names its checkpoint.
    """
    stop.listen()
    timeout_seconds = prepared.recipe.engine.collective_timeout_seconds
    # A rank may be silent for less time than a collective may take: so it is named, and then the run ends.
    start_process_group(prepared.world, timeout_seconds + 3 * beat_seconds(timeout_seconds))
    heartbeat = Heartbeat(prepared.world, timeout_seconds)
    try:
        results = _train(prepared, stop)
    except BaseException as error:
        # SystemExit is agreed by all.
        heartbeat.stop(together=isinstance(error, SystemExit))
        raise
    heartbeat.stop(together=True)
    return results


def _train(prepared: Prepared, stop: StopRequest) -> list[RetrievalResult]:
    recipe, world = prepared.recipe, prepared.world
    run_dir = Path(recipe.run_dir)
    model = prepared.model.to(world.device)
    engine = Engine(
        model,
        build_optimizer(model, recipe.optim, global_batch_size=recipe.training.global_batch_size),
        prepared.deepspeed_config,
        LossScale() if recipe.training.precision == "fp16" else None,
        None if recipe.training.ema_decay is None else Ema(model, recipe.training.ema_decay),
        {model.logit_scale: model.max_log_scale},
    )
    progress = prepared.start()
    if recipe.training.resume == "auto":
        progress = resume(recipe.checkpoint, engine, model, run_dir, progress, world)
    # Only now is it sure that the folder's earlier run, if any, goes on as this recipe says.
    if world.is_main:
        prepared.write_record()
    tracker = Tracker(
        recipe.tracker,
        run_dir,
        name=recipe.name,
        recipe=recipe,
        start_step=progress.step,
        wandb_id=progress.wandb_id,
        is_main=world.is_main,
    )
    with tracker:
        results = _Run(prepared, engine, tracker, progress, stop).to_the_end()
        if world.is_main:
            with _not_worth_the_run(report.LOSS_PICTURE):
                report.draw_loss(read_metrics(run_dir), run_dir)
    return results


@contextlib.contextmanager
def _not_worth_the_run(file: str) -> Iterator[None]:
    """A disk that refuses this file costs a warning."""
    try:
        yield
    except (OSError, UserError) as error:
        _log.warning("%s is not written (%s): the run goes on", file, error)


class _Run:
    """The epochs of one run, and where it stands in them."""

    def __init__(
        self, prepared: Prepared, engine: Engine, tracker: Tracker, progress: Progress, stop: StopRequest
    ) -> None:
        self._prepared, self._engine, self._tracker, self._stop = prepared, engine, tracker, stop
        self._recipe, self._world = prepared.recipe, prepared.world
        self._start, self._steps_an_epoch = progress, progress.steps_an_epoch
        self._num_steps = self._steps_an_epoch * self._recipe.training.num_epochs
        self._last_step = min(self._num_steps, self._recipe.training.max_steps or self._num_steps)
        self._step = self._saved_step = progress.step
        self._evaluated_step, self._results = -1, list[RetrievalResult]()
        self._bad_samples = BadSampleCount(self._recipe.data.max_bad_share, self._world)
        self._saver = Saver(
            self._recipe.checkpoint,
            engine,
            prepared.model,
            Path(self._recipe.run_dir),
            self._world,
            configuration.to_yaml(self._recipe),
        )
        self._health = HealthWatch(
            progress.health,
            spike_ratio=self._recipe.training.spike_ratio,
            skip_spikes=self._recipe.training.skip_spikes,
            max_sick_in_a_row=self._recipe.training.max_sick_steps_in_a_row,
            run_dir=Path(self._recipe.run_dir),
        )

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
            self._engine.train()
            self._catch_up()
            meter = Meter(self._world, recipe.training.global_batch_size)
            for batch in in_step(meter.waiting_for(self._prepared.batches(range(self._step, self._last_step)))):
                self._set_learning_rates()
                seed_step(recipe.training.seed, self._step, self._world.rank)
                epoch = self._step // self._steps_an_epoch
                result = train_step(
                    self._engine, model, batch, self._health, recipe.loss, epoch, recipe.training.matmul_dtype
                )
                self._step += 1
                self._health.note(self._step, result.loss, result.sickness, batch.keys, self._world)
                self._bad_samples.add(len(batch.keys), batch.bad_samples)
                if self._step % recipe.tracker.every_steps == 0 or self._step == self._last_step:
                    self._log_step(result, meter, bar)
                bar.update()
                with meter.stopped():
                    evaluates = self._is_due(recipe.evaluation.every_epochs)
                    if self._is_due(recipe.checkpoint.every_epochs, recipe.checkpoint.every_steps) or (
                        evaluates and recipe.checkpoint.best_metric
                    ):
                        self._save()
                    self._leave_if_asked()
                    if evaluates:
                        self._evaluate()
        saved = self._save()
        results = self._evaluate()
        self._saver.finish()
        if not saved:
            raise UserError(
                f"the run is over, but {recipe.run_dir} took no last checkpoint: make room there, and run the same "
                "command with training.resume=auto"
            )
        return results

    def _catch_up(self) -> None:
        """Do the evaluation before which the run was stopped that goes on here: its checkpoint comes first."""
        if self._step == 0 or not self._is_due(self._recipe.evaluation.every_epochs):
            return
        done = self._world.is_main and any(
            line["trainer/step"] == self._step and any(name.startswith("validation/") for name in line)
            for line in read_metrics(Path(self._recipe.run_dir))
        )
        if not from_main(done):
            self._evaluate()

    def _set_learning_rates(self) -> None:
        """The schedule counts updates: a batch that is skipped leaves it where it was."""
        optim = self._recipe.optim
        decay_epochs = optim.decay_epochs or self._recipe.training.num_epochs
        share = schedule(
            self._step - self._health.health.num_skipped,
            warmup_steps=round(optim.warmup_epochs * self._steps_an_epoch),
            decay_steps=round(decay_epochs * self._steps_an_epoch),
            final_share=optim.final_lr_share,
        )
        set_learning_rates(self._engine.param_groups, share)

    def _is_due(self, every_epochs: int, every_steps: int | None = None) -> bool:
        epoch_ends = self._step % (every_epochs * self._steps_an_epoch) == 0
        return epoch_ends or bool(every_steps and self._step % every_steps == 0)

    def _log_step(self, result: StepResult, meter: Meter, bar: tqdm) -> None:
        epoch, read, bad_samples = self._step / self._steps_an_epoch, meter.read(), self._bad_samples.check()
        learning_rates = named_learning_rates(self._engine.param_groups)
        self._tracker.log(
            self._step,
            {
                **step_metrics(result),
                **self._health.metrics(),
                "train/epoch": epoch,
                **learning_rates,
                **self._engine.optimizer_metrics(),
                **read,
                **{f"data/{name}": count for name, count in bad_samples.items()},
            },
        )
        shown = progress_line(epoch, result.loss, next(iter(learning_rates.values())), read, bad_samples)
        bar.set_postfix_str(shown, refresh=False)
        if bar.disable and self._world.is_main:
            _log.info("step %d of %d, %s", self._step, self._last_step, shown)

    def _leave_if_asked(self) -> None:
        """One rank that was asked to stop is enough: all write the checkpoint, if the disk takes it, and end."""
        if not any_over_ranks(self._stop.is_made()):
            return
        reasons = {reason for reason in gather_items(self._stop.reason) if reason is not None}
        self._save()
        self._saver.finish(in_a_hurry=True)
        self._stop.ignore_more()
        if self._world.is_main:
            stands = f"training.resume=auto goes on from {checkpoint_folder.name_of(self._saved_step)}"
            if not self._saved_step:
                stands = f"there is no checkpoint: make room in {self._recipe.run_dir}"
            why = " and ".join(sorted(reasons))
            _log.warning("stopped by %s after step %d of %d; %s", why, self._step, self._last_step, stands)
        raise SystemExit(EXIT_PREEMPTED)

    def _save(self) -> bool:
        """False where there is no checkpoint of this step, since the disk refused it."""
        if self._saved_step == self._step:
            return True
        check_finite_weights(self._prepared.model, self._step)
        average_running_statistics(self._prepared.model)
        epoch, batch = divmod(self._step, self._steps_an_epoch)
        progress = dataclasses.replace(
            self._start,
            world_size=self._world.size,
            step=self._step,
            epoch=epoch,
            batch=batch,
            wandb_id=self._tracker.wandb_id,
            health=self._health.health,
            loss_scale=self._engine.loss_scale,
        )
        if self._saver.save(progress):
            self._saved_step = self._step
        return self._saved_step == self._step

    def _evaluate(self) -> list[RetrievalResult]:
        if self._evaluated_step == self._step:
            return self._results
        self._evaluated_step = self._step
        average_running_statistics(self._prepared.model)
        try:
            with self._engine.averaged_weights() if self._recipe.evaluation.ema else contextlib.nullcontext():
                self._results = self._prepared.evaluate(self._stop.is_made)
        except EvaluationStoppedError:
            self._leave_if_asked()  # the run that goes on makes up for it
        if self._results:
            flat = {key: value for result in self._results for key, value in report.flat_metrics(result).items()}
            self._saver.note_metrics(self._step, flat)
            # Last, as from here on the evaluation counts as done.
            self._tracker.log(self._step, flat)
            if self._world.is_main:
                with _not_worth_the_run(report.RESULTS_FILE):
                    report.write_results(self._results, Path(self._recipe.run_dir))
                self._show_examples()
        barrier()
        return self._results

    def _show_examples(self) -> None:
        recipe, run_dir = self._recipe, Path(self._recipe.run_dir)
        for result in self._results:
            name, shards = result.set_name, self._prepared.validation_sets[result.set_name]
            rows = examples.write_examples(result.examples, recipe.task, name, shards, recipe.data, run_dir)
            picture = run_dir / examples.EXAMPLES_FOLDER / name / examples.SHEET_FILE
            self._tracker.log_examples(self._step, name, rows, picture)
