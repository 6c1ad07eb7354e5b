"""Frozen encoders over shards: ``deepspeed launch/embed.py recipe=... features=NAME`` or ``run=runs/NAME ...``."""

from __future__ import annotations

import inspect
import json
import logging
import os
import sys
from dataclasses import fields
from pathlib import Path

import torch

from audiotext_dist import configuration
from audiotext_dist.data.embedding import EmbedConfig, embed_shards, jobs_to_do, plan_jobs
from audiotext_dist.data.encoders import Modality, encoder_of
from audiotext_dist.data.sets import open_sets
from audiotext_dist.distributed import World
from audiotext_dist.errors import UserError, run_for_people
from audiotext_dist.models.dual_encoder import DualEncoder, build_model
from audiotext_dist.training.preemption import end_with_launcher
from audiotext_dist.training.prepare import build_towers
from audiotext_dist.training.recipe import Recipe, read_recipe, read_run_recipe
from audiotext_dist.training.weights import load_model

HELP = """Embed what frozen encoders say of shards, once, into a file beside each: SHARD.NAME.safetensors.

The frames (or captions) of every set of a recipe, by its frozen tower; training then opens no picture:
    deepspeed launch/embed.py recipe=FILE.yaml features=clip
    deepspeed launch/pretrain.py recipe=FILE.yaml data.frame_features=clip        (data.caption_features=clip)

Both towers of a trained run or an export, over any shards (crops from the start, all captions):
    deepspeed launch/embed.py run=runs/NAME features=teacher shards=data/train out=s3://bucket/teacher

Without a recipe, CLIP's picture tower:
    python launch/embed.py task=audio-image model.image.name=ViT-B-32-quickgelu model.image.pretrained=openai \\
        shards=data/train features=clip

Any number of processes; the files do not depend on it. A job that is killed goes on when the same command is run
again. Files of this name by another encoder, or of shards that changed since, are refused, unless overwrite=true.
A clip that does not decode is named and left out; training puts another in its place, as for any bad sample.

run: a run folder or export, instead of recipe=. """


def main() -> None:
    """Read the words, build the encoders, embed this rank's share of the shards."""
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    if not words or {"-h", "--help"} & set(words):
        keys = inspect.cleandoc(EmbedConfig.__doc__ or "").partition("\n\n")[2]
        print(f"{HELP}{keys}\n\n  run=None\n{configuration.describe(EmbedConfig)}\n\nOther keys are the recipe's:")
        print(configuration.describe(Recipe))
        return
    end_with_launcher()
    world = World.from_environment()
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(message)s", force=True)
    logging.getLogger("audiotext_dist").setLevel(logging.INFO)
    if world.local_size > 1 and not torch.cuda.is_available():
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.local_size))
    run, config, changes = _split(words)
    recipe = _read(run, config, changes)
    model = _build(run, recipe)
    encoders = {
        modality: encoder_of(model, recipe.model, recipe.data, modality) for modality in _what(run, config, recipe)
    }
    sets = {**recipe.data.train, **{f"validation {name}": chosen for name, chosen in recipe.data.validation.items()}}
    opened = open_sets(sets, recipe.data, frames="image" in encoders, captions="text" in encoders)
    folders = [chosen.features for chosen in sets.values()]
    retry = recipe.data.node_cache().retry
    jobs = plan_jobs(zip(opened, folders, strict=True), config, encoders, retry)
    own = jobs[world.rank :: world.size]
    try:
        to_do = jobs_to_do(own, config, retry)
        num_bad = embed_shards(model.to(world.device), to_do, config, encoders, recipe.data, world)
    except UserError as error:
        error.on_every_rank = False
        raise
    print(
        f"'{config.features}' features ({', '.join(encoders)}): rank {world.rank} of {world.size} made {len(to_do)} "
        f"files, {num_bad} clips could not be embedded; {len(own) - len(to_do)} files were there already"
    )


def _split(words: list[str]) -> tuple[str | None, EmbedConfig, list[str]]:
    """(run=, this command's own keys, the recipe's words)."""
    own_keys = {entry.name for entry in fields(EmbedConfig)}
    own = [word for word in words if word.partition("=")[0].partition("[")[0] in own_keys]
    runs = [word.removeprefix("run=") for word in words if word.startswith("run=")]
    changes = [word for word in words if word not in own and not word.startswith("run=")]
    if len(runs) > 1:
        raise UserError("run= is given twice: embed one run at a time")
    return (runs[0] if runs else None), configuration.parse(EmbedConfig, own), changes


def _read(run: str | None, config: EmbedConfig, changes: list[str]) -> Recipe:
    """The recipe, its sets replaced where the command names shards of its own; nothing is taken from features."""
    if config.shards is not None:
        chosen = json.dumps({"given": {"shards": config.shards, "features": config.out}})
        changes = [*changes, f"data.train={chosen}", "data.validation={}"]
    changes = [*changes, "data.frame_features=null", "data.caption_features=null"]
    has_recipe = any(word.startswith("recipe=") for word in changes)
    if run is None:
        return read_recipe(changes if has_recipe else ["name=embed", *changes])
    if has_recipe:
        raise UserError("run= and recipe= exclude each other: a run brings its own recipe")
    return read_run_recipe(Path(run), changes)


def _build(run: str | None, recipe: Recipe) -> DualEncoder:
    """The towers, which compute in float32 whatever the recipe trains in."""
    if run is None:
        model = build_towers(recipe)
    else:
        model = build_model(recipe.model.without_weights(), recipe.task, recipe.data.sample_rate_hz)
        load_model(model, run)
    model.autocast_dtype = None
    return model


def _what(run: str | None, config: EmbedConfig, recipe: Recipe) -> list[Modality]:
    """The towers that are asked for, or those that are trained already."""
    every: tuple[Modality, ...] = ("audio", "image", "text")
    modalities = [modality for modality in every if modality in recipe.task]
    for asked in config.what:
        if asked not in modalities:
            raise UserError(f"what={asked}: task={recipe.task} has no such tower, give one of {', '.join(modalities)}")
    if config.what:
        return list(config.what)
    if run is not None:
        return modalities
    frozen = [modality for modality in modalities if getattr(getattr(recipe.model, modality), "frozen", False)]
    if not frozen:
        raise UserError(f"task={recipe.task} freezes no tower, so there is nothing to embed: give run=FOLDER or what=")
    return frozen


if __name__ == "__main__":
    run_for_people(main)
