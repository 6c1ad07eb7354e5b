"""Open the data and build the model of a recipe: what a person can get wrong is met here, before any process group
starts, but for what only the content of clips tells.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from audiotext_dist import configuration, storage
from audiotext_dist.data.batch import Batch
from audiotext_dist.data.features import Features
from audiotext_dist.data.loader import TrainingBatches
from audiotext_dist.data.plan import Plan
from audiotext_dist.data.sets import make_plan, open_sets, order_of, warn_of_small_cache
from audiotext_dist.data.shard import Shard
from audiotext_dist.data.workers import iterate
from audiotext_dist.distributed import World
from audiotext_dist.errors import UserError
from audiotext_dist.evaluation.checks import check_metric, check_sets
from audiotext_dist.evaluation.retrieval import RetrievalResult, evaluate_set
from audiotext_dist.models.audio import AudioTower
from audiotext_dist.models.dual_encoder import DualEncoder, build_model
from audiotext_dist.training import checkpoint_folder, weights
from audiotext_dist.training.checkpoint import Progress
from audiotext_dist.training.compiling import check_compiler, compile_towers
from audiotext_dist.training.engine_config import deepspeed_config
from audiotext_dist.training.features import features_of, needs_pictures, replaced_encoders
from audiotext_dist.training.recipe import Recipe
from audiotext_dist.training.upload import remote_names

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that is known to be possible."""

    recipe: Recipe
    world: World
    model: DualEncoder
    train_sets: list[list[Shard]]
    validation_sets: dict[str, list[Shard]]
    train_features: Features
    validation_features: dict[str, Features]

    def plan(self, epoch: int) -> Plan:
        """The order of one epoch."""
        return make_plan(
            self.train_sets,
            self.recipe.data,
            seed=self.recipe.training.seed,
            epoch=epoch,
            global_batch_size=self.recipe.training.global_batch_size,
            world_size=self.world.size,
        )

    def batches(self, steps: range) -> Iterator[Batch]:
        """This rank's part of the batches of these steps, on its device."""
        data, text = self.recipe.data, self.model.text
        batches = TrainingBatches(
            self.train_sets,
            self.plan,
            data.decode_config(
                audio="audio" in self.recipe.task,
                frames=self.recipe.training_frames,
                frame_pixels=self.model.frame_pixels,
                random=True,
            ),
            seed=self.recipe.training.seed,
            world=self.world,
            tokenize=None if text is None or data.caption_features is not None else text.tokenize,
            num_lone_epochs=self.recipe.loss.frame_match_from_epoch,
            features=self.train_features,
            cache=data.node_cache(),
        )
        return iterate(batches, steps, num_workers=data.num_workers, device=self.world.device)

    def evaluate(self, is_asked_to_stop: Callable[[], bool] | None = None) -> list[RetrievalResult]:
        """The model as it stands on every validation set; every rank calls it, and ``embed_set`` what is given."""
        return [
            evaluate_set(
                self.model,
                self.recipe.task,
                shards,
                self.recipe.data,
                self.recipe.data.validation[name],
                set_name=name,
                batch_size=self.recipe.evaluation.batch_size,
                world=self.world,
                features=self.validation_features[name],
                num_examples=self.recipe.evaluation.num_examples,
                frame=self.recipe.evaluation.frame,
                is_asked_to_stop=is_asked_to_stop,
            )
            for name, shards in self.validation_sets.items()
        ]

    @functools.cached_property
    def deepspeed_config(self) -> dict[str, Any]:
        """What DeepSpeed is told; the user's own file is read once."""
        return deepspeed_config(
            self.recipe.engine,
            global_batch_size=self.recipe.training.global_batch_size,
            world_size=self.world.size,
            gradient_clipping=self.recipe.optim.gradient_clipping,
            num_micro_batches=self.recipe.num_micro_batches(self.world.size),
        )

    def write_record(self) -> None:
        """Leave in the run folder what it runs by: the resolved recipe, and what DeepSpeed is told, whatever becomes of
        the file in engine.deepspeed_config.
        """
        run_dir, told = Path(self.recipe.run_dir), json.dumps(self.deepspeed_config, indent=2)
        storage.write_bytes(str(run_dir / checkpoint_folder.RECIPE_FILE), configuration.to_yaml(self.recipe).encode())
        storage.write_bytes(str(run_dir / checkpoint_folder.DEEPSPEED_FILE), told.encode())

    def start(self) -> Progress:
        """Where a new run begins."""
        return Progress(
            step=0,
            epoch=0,
            batch=0,
            seed=self.recipe.training.seed,
            global_batch_size=self.recipe.training.global_batch_size,
            # Every epoch has as many: weights are exact and the tail is dropped.
            steps_an_epoch=self.plan(epoch=0).num_batches,
            world_size=self.world.size,
            optimizer=self.recipe.optim.name,
            order=order_of(self.train_sets, self.recipe.data, self.recipe.training.global_batch_size),
        )


def prepare(recipe: Recipe, world: World) -> Prepared:
    """Open the data, build the model, check that all fits together.

    Raises:
        UserError: one line that names the thing and the mend.
    """
    recipe.check_world(world.size)
    recipe.check_fetching()
    if recipe.engine.compile:
        check_compiler()
    _check_writable(Path(recipe.run_dir))
    if recipe.training.resume == "never" and checkpoint_folder.has_checkpoints(Path(recipe.run_dir)):
        raise UserError(
            f"{recipe.run_dir} holds checkpoints of an earlier run: "
            "go on with training.resume=auto, or start anew under another name= or run_dir="
        )
    target = recipe.checkpoint.upload_to
    # Every rank looks: where one alone gave up, those of other nodes would wait for it.
    if recipe.training.resume == "never" and target is not None and remote_names(target):
        raise UserError(
            f"checkpoint.upload_to={target} holds checkpoints of an earlier run: "
            "go on with training.resume=auto, or give another"
        )
    if recipe.checkpoint.best_metric is not None:
        check_metric(recipe.checkpoint.best_metric, recipe.task, recipe.data.validation)
    frames, captions = needs_pictures(recipe), "text" in recipe.task
    train_sets = open_sets(recipe.data.train, recipe.data, frames=frames, captions=captions)
    validation_sets = open_sets(recipe.data.validation, recipe.data, frames=frames, captions=captions)
    check_sets(recipe.task, recipe.data.validation, validation_sets)
    model = build_towers(recipe)
    encoders = replaced_encoders(recipe, model)
    prepared = Prepared(
        recipe=recipe,
        world=world,
        model=model,
        train_sets=train_sets,
        validation_sets=dict(zip(recipe.data.validation, validation_sets, strict=True)),
        train_features=features_of(recipe, encoders, recipe.data.train, train_sets, teachers=recipe.data.teachers),
        validation_features={
            name: features_of(recipe, encoders, {name: chosen}, [shards])
            for (name, chosen), shards in zip(recipe.data.validation.items(), validation_sets, strict=True)
        },
    )
    prepared.plan(epoch=0)
    _ = prepared.deepspeed_config
    if recipe.engine.activation_checkpointing:
        _checkpoint_activations(prepared.model, world)
    if recipe.engine.compile:
        compile_towers(prepared.model)
    if world.local_rank == 0:
        warn_of_small_cache(train_sets, recipe.data, global_batch_size=recipe.training.global_batch_size, world=world)
    return prepared


def _check_writable(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir):
            pass
    except OSError as error:
        raise UserError(f"run_dir={run_dir} cannot be written to ({error.strerror}): give another") from None


def _checkpoint_activations(model: DualEncoder, world: World) -> None:
    """In each trained tower with stacks of layers that know how: transformers do, MobileNets and CLIP's ResNets not."""
    towers = {modality: getattr(model, modality) for modality in ("audio", "image", "text")}
    stacks = {
        modality: [module for module in tower.modules() if hasattr(module, "grad_checkpointing")]
        for modality, tower in towers.items()
        if tower is not None and _trains_layers(tower)
    }
    without = " and ".join(modality for modality, found in stacks.items() if not found)
    if not any(stacks.values()):
        raise UserError(
            f"engine.activation_checkpointing=true has no effect on what is trained ({without or 'no'} tower): "
            "leave it out"
        )
    for stack in itertools.chain(*stacks.values()):
        stack.grad_checkpointing = True
    if without and world.local_rank == 0:
        _log.warning("engine.activation_checkpointing=true has no effect on the %s tower", without)


def _trains_layers(tower: nn.Module) -> bool:
    """Whether more is trained of it than the projection, which a frozen tower may have too."""
    return any(value.requires_grad and not name.startswith("projection.") for name, value in tower.named_parameters())


def build_towers(recipe: Recipe) -> DualEncoder:
    """The model, with the towers that the recipe takes from other runs."""
    torch.manual_seed(recipe.training.seed)
    if recipe.model.init is not None:
        return _continued(recipe, recipe.model.init)
    model = build_model(recipe.model, recipe.task, recipe.data.sample_rate_hz, recipe.training.autocast_dtype)
    # Audio last: it may start as a copy of the image tower, of whose other run build_model knows nothing.
    for modality in sorted(recipe.task.split("-"), reverse=True):
        tower = getattr(recipe.model, modality)
        if modality == "audio" and recipe.model.audio.init_from_image and recipe.model.image.init is not None:
            assert model.image is not None
            assert isinstance(model.audio, AudioTower)
            copied = AudioTower(recipe.model.audio, recipe.data.sample_rate_hz, model.image.visual)
            model.audio.transformer.load_state_dict(copied.transformer.state_dict())
        if tower.init is not None:
            weights.load_tower(getattr(model, modality), modality, tower.init)
        elif getattr(tower, "frozen", False) and tower.pretrained is None:
            _log.warning(
                "the frozen %s tower has random weights: give model.%s.pretrained or .init", modality, modality
            )
    return model


def _continued(recipe: Recipe, source: str) -> DualEncoder:
    """The model of another run, to be trained on."""
    model = build_model(
        recipe.model.without_weights(), recipe.task, recipe.data.sample_rate_hz, recipe.training.autocast_dtype
    )
    own_scale = model.logit_scale.detach().clone()
    weights.load_model(model, source)
    if not recipe.model.learn_temperature:
        with torch.no_grad():
            model.logit_scale.copy_(own_scale)
    return model
