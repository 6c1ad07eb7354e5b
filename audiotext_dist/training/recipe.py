"""The recipe: all configuration of one training run, typed and cross-checked before anything starts.

Each part is a dataclass beside the code that it configures; this file composes them. A YAML file holds a
recipe as small changes to these defaults, and ``key=value`` words change it further.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from audiotext_dist import configuration, storage
from audiotext_dist.data.decode import FrameChoice
from audiotext_dist.data.feature_files import check_feature_name
from audiotext_dist.data.sets import DataConfig
from audiotext_dist.errors import UserError, require_positive
from audiotext_dist.evaluation.embedded_clips import EvaluatedFrame
from audiotext_dist.losses.config import LossConfig
from audiotext_dist.models.dual_encoder import ModelConfig, Task
from audiotext_dist.models.towers import check_heard
from audiotext_dist.training.checkpoint_folder import RECIPE_FILE, weights_folder
from audiotext_dist.training.engine_config import EngineConfig
from audiotext_dist.training.optim import OptimConfig
from audiotext_dist.training.saving import CheckpointConfig
from audiotext_dist.training.tracker_config import TrackerConfig


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length, batch and precision of the run.

    max_steps: stop after so many steps although epochs are left; the schedule still counts num_epochs.
    micro_batch_size: clips that the towers of a rank hold at once, null for all of its share. The negatives are
    those of the whole batch all the same, for one more forward. Gradients cross the network once a step, under
    engine.zero_stage=2 once for each micro-batch.
    precision: what the towers compute in; weights, optimizer, gradients' sums and the loss's own sums are float32 in
    any case. fp16 scales the loss by a factor that finds its own size.
    resume: ``auto`` goes on from the newest complete checkpoint in run_dir, or starts where there is none.
    ema_decay: of the moving average of the weights, such as 0.9999; null keeps none. Evaluation and export take the
    average where there is one (unless evaluation.ema=false, or ema=false), and so do other runs that start from this.
    BatchNorm's running statistics are not averaged: those of mobilenet.batch_norm=batch are the last weights'.
    max_sick_steps_in_a_row: a step whose loss or gradient is not finite is skipped; more of them in a row end the run.
    spike_ratio: a loss above so many times the median of the last 32 is a spike: counted, logged, and left out with
    skip_spikes.
    """

    num_epochs: int = 10
    max_steps: int | None = None
    global_batch_size: int = 64
    micro_batch_size: int | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    ema_decay: float | None = None
    seed: int = 0
    resume: Literal["auto", "never"] = "never"
    max_sick_steps_in_a_row: int = 10
    spike_ratio: float | None = 3.0
    skip_spikes: bool = False

    def __post_init__(self) -> None:
        require_positive(
            self, "training", "num_epochs", "max_steps", "global_batch_size", "micro_batch_size", "spike_ratio"
        )
        if self.max_sick_steps_in_a_row < 0:
            raise UserError(f"training.max_sick_steps_in_a_row={self.max_sick_steps_in_a_row} must not be negative")
        if self.skip_spikes and self.spike_ratio is None:
            raise UserError(
                "training.skip_spikes=true says nothing with training.spike_ratio=null, which finds no spikes: set a "
                "ratio such as 3, or skip_spikes=false"
            )
        if self.seed < 0:
            raise UserError(f"training.seed={self.seed} must not be negative")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise UserError(f"training.ema_decay={self.ema_decay} must lie in [0, 1)")

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """What the towers compute in, where it is not float32."""
        return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]

    @property
    def matmul_dtype(self) -> torch.dtype | None:
        """What the loss's matmuls read. Not float16, where a large batch's small probabilities would be zero."""
        return torch.bfloat16 if self.precision == "bf16" else None


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """When and how data.validation is evaluated.

    ema: with the averaged weights, where the run has them.
    frame: by which a clip is found in task=audio-image, the middle one or the best one for each pair; under
    loss.frame_match=multiframe it is always all of them (Temporal agreement, Eq. 4).
    num_examples: queries whose results are shown with sound and picture, the same ones each time.
    """

    every_epochs: int = 1
    batch_size: int = 64  # clips a rank embeds at once
    num_examples: int = 16
    ema: bool = True
    frame: EvaluatedFrame = "middle"

    def __post_init__(self) -> None:
        require_positive(self, "evaluation", "every_epochs", "batch_size")
        if self.num_examples < 0:
            raise UserError(f"evaluation.num_examples={self.num_examples} must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run: ``deepspeed launch/pretrain.py recipe=FILE.yaml key=value ...``."""

    name: str = "???"
    task: Task = "audio-text"
    run_dir: str = "runs/${name}"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)

    def __post_init__(self) -> None:
        for key, text in _texts(asdict(self)):
            storage.check_no_credentials(text, key)
        if not self.data.train:
            raise UserError("no training data: give data.train.NAME.shards=FOLDER")
        self._check_features()
        self._check_loss()
        self._check_frame_match()
        if "audio" in self.task:
            check_heard(self.model.audio, self.data.clip_seconds)
        if self.optim.warmup_epochs > self.training.num_epochs:
            raise UserError(
                f"optim.warmup_epochs={self.optim.warmup_epochs:g} is longer than training.num_epochs="
                f"{self.training.num_epochs}: lower it"
            )

    def check_fetching(self) -> None:
        """Raise ``UserError`` where other ranks would not wait until a shard out of reach is given up, and named."""
        sets = [*self.data.train.values(), *self.data.validation.values()]
        has_remote = any(storage.is_remote(path) for each in sets for path in (each.shards, each.features or ""))
        seconds, limit_seconds = self.data.node_cache().retry.longest_seconds, self.engine.collective_timeout_seconds
        if has_remote and seconds >= limit_seconds:
            raise UserError(
                f"data.fetch_retries={self.data.fetch_retries} and data.fetch_stall_seconds="
                f"{self.data.fetch_stall_seconds:g} let a rank wait {seconds:.0f} s for one shard, longer than "
                f"engine.collective_timeout_seconds={limit_seconds:g}: raise that, or lower these"
            )

    def _check_loss(self) -> None:
        if self.loss.name == "sigmoid" and self.model.init_logit_bias is None:
            raise UserError(
                "loss.name=sigmoid needs a bias: set model.init_logit_bias=-10, with model.init_temperature=0.1"
            )
        if self.loss.name == "softmax" and self.model.init_logit_bias is not None:
            raise UserError(
                f"model.init_logit_bias={self.model.init_logit_bias:g} changes no softmax: set it to null, or "
                "loss.name=sigmoid"
            )
        self._check_teachers()

    def _check_teachers(self) -> None:
        if self.loss.teacher_weight and not self.data.teachers:
            raise UserError(
                f"loss.teacher_weight={self.loss.teacher_weight:g} needs teachers: embed the training sets with "
                "launch/embed.py run=RUN features=NAME, and give data.teachers.NAME=RUN"
            )
        if self.data.teachers and not self.loss.teacher_weight:
            raise UserError(
                "data.teachers says nothing with loss.teacher_weight=0: raise that, or set data.teachers={}"
            )
        if self.data.teachers and self.task != "audio-text":
            raise UserError(f"data.teachers are of audio and captions, not of task={self.task}: set data.teachers={{}}")
        for name in self.data.teachers:
            check_feature_name(name, "data.teachers")

    @property
    def training_frames(self) -> FrameChoice:
        """Which frames of a clip are decoded in training, from ``loss.frame_match_from_epoch`` on."""
        if "image" not in self.task:
            return "none"
        return "random" if self.loss.frame_match == "one" else "all"

    def _check_frame_match(self) -> None:
        loss, num_outputs, num_frames = self.loss, self.model.audio.num_outputs, self.data.num_frames
        if loss.frame_match != "one" and self.task != "audio-image":
            raise UserError(
                f"loss.frame_match={loss.frame_match} matches sound to frames, not task={self.task}: set it to one"
            )
        if loss.frame_match_from_epoch >= self.training.num_epochs:
            raise UserError(
                f"loss.frame_match_from_epoch={loss.frame_match_from_epoch} never comes in training.num_epochs="
                f"{self.training.num_epochs} epochs, counted from 0: lower it"
            )
        if loss.frame_match == "multiframe" and num_outputs != num_frames:
            raise UserError(
                f"loss.frame_match=multiframe needs an audio output a frame, but model.audio.num_outputs={num_outputs} "
                f"and data.num_frames={num_frames}: set the first to {num_frames}"
            )
        if self.task == "audio-image" and loss.frame_match != "multiframe" and num_outputs > 1:
            raise UserError(
                f"model.audio.num_outputs={num_outputs} goes with loss.frame_match=multiframe, not {loss.frame_match}: "
                "set it to 1"
            )
        if self.evaluation.frame != "middle" and (self.task != "audio-image" or num_outputs > 1):
            raise UserError(
                f"evaluation.frame={self.evaluation.frame} chooses among frames for a sound as a whole, which "
                f"task={self.task} with model.audio.num_outputs={num_outputs} does not: set it to middle"
            )

    def num_micro_batches(self, world_size: int) -> int:
        """Parts of a rank's share of the batch that go through the towers one after another."""
        share = self.training.global_batch_size // world_size
        return share // min(share, self.training.micro_batch_size or share)

    def _check_features(self) -> None:
        for key, modality in (("frame_features", "image"), ("caption_features", "text")):
            name = getattr(self.data, key)
            if name is None:
                continue
            if modality not in self.task:
                raise UserError(f"data.{key}={name} says nothing to task={self.task}: set it to null")
            if not getattr(self.model, modality).frozen:
                raise UserError(
                    f"data.{key}={name} is what the {modality} tower said before, and model.{modality}.frozen=false "
                    f"trains it: set data.{key}=null, or freeze the tower"
                )
            if self.model.projection_dim is not None:
                raise UserError(
                    f"data.{key}={name} is what the {modality} tower said through the projection that it had then, and "
                    f"this run trains its own: set data.{key}=null, or model.projection_dim=null"
                )

    def check_world(self, world_size: int) -> None:
        """Raise ``UserError`` unless the batch can be shared by so many processes."""
        batch = self.training.global_batch_size
        if batch % world_size:
            nearest = max(world_size, round(batch / world_size) * world_size)
            raise UserError(
                f"training.global_batch_size={batch} cannot be shared by {world_size} processes: set it to {nearest}"
            )
        share, micro = batch // world_size, self.training.micro_batch_size
        if micro is not None and micro < share and share % micro:
            fitting = next(size for size in range(micro, 0, -1) if share % size == 0)
            raise UserError(
                f"training.micro_batch_size={micro} does not divide the {share} clips of each process: set it to "
                f"{fitting}"
            )


def _texts(level: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string of nested dictionaries and lists, with its key in full."""
    if isinstance(level, str):
        yield key, level
    elif isinstance(level, dict):
        for name, value in level.items():
            yield from _texts(value, f"{key}.{name}" if key else name)
    elif isinstance(level, list | tuple):
        for value in level:
            yield from _texts(value, key)


def read_recipe(words: Sequence[str]) -> Recipe:
    """The recipe that the words of a command line name: ``recipe=FILE`` and ``key=value`` changes.

    ``--local_rank=N``, which the DeepSpeed launcher inserts, is passed over.

    Raises:
        UserError: one line that names the key and the mend.
    """
    words = [word for word in words if not word.startswith("--local_rank")]
    files = [word.removeprefix("recipe=") for word in words if word.startswith("recipe=")]
    if len(files) > 1:
        raise UserError(f"recipe= is given {len(files)} times: give one file")
    changes = [word for word in words if not word.startswith("recipe=")]
    return configuration.parse(Recipe, changes, yaml_file=files[0] if files else None)


def read_run_recipe(run_dir: Path, changes: Sequence[str] = ()) -> Recipe:
    """The resolved recipe that a run left in its folder, with ``key=value`` changes.

    Raises:
        UserError: the folder is no run, or a change is wrong.
    """
    # The checkpoint's own copy fits its weights whatever happened to the folder since.
    places = [folder / RECIPE_FILE for folder in (weights_folder(run_dir), run_dir)]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise UserError(f"{run_dir} is no run folder, it has no {RECIPE_FILE}: check the path")
    return configuration.parse(Recipe, changes, yaml_file=os.fspath(file))
