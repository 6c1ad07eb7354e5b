"""Retrieval table of a trained run: ``python launch/evaluate.py run=runs/NAME [key=value ...]``."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from audiotext_dist import configuration
from audiotext_dist.data.sets import open_sets
from audiotext_dist.data.shard import Shard
from audiotext_dist.distributed import World
from audiotext_dist.errors import UserError, run_for_people
from audiotext_dist.evaluation import report
from audiotext_dist.evaluation.checks import check_sets
from audiotext_dist.evaluation.examples import write_examples
from audiotext_dist.evaluation.retrieval import RetrievalResult, evaluate_set
from audiotext_dist.models.dual_encoder import DualEncoder, build_model
from audiotext_dist.training.checkpoint_folder import run_folder
from audiotext_dist.training.engine import start_process_group, stop_process_group
from audiotext_dist.training.features import features_of, needs_pictures, replaced_encoders
from audiotext_dist.training.preemption import end_with_launcher
from audiotext_dist.training.prepare import build_towers
from audiotext_dist.training.recipe import Recipe, read_run_recipe
from audiotext_dist.training.weights import load_model

HELP = """Evaluate a run's newest checkpoint, or any exported weights, on its validation sets or others.

    python launch/evaluate.py run=runs/NAME                    (runs/NAME/checkpoints/best: not the newest one)
    python launch/evaluate.py run=runs/NAME data.validation.clotho.shards=FOLDER out=results
    python launch/evaluate.py run=runs/NAME weights=FILE.safetensors out=results
    deepspeed launch/evaluate.py run=runs/NAME            (clips shared over all processes)

Zero-shot, with a tower that the run was not trained with (here audio-text, through the pictures of an audio-image run):
    python launch/evaluate.py run=runs/NAME task=audio-text model.text.name=ViT-B-32-quickgelu \\
        model.text.pretrained=openai data.validation.clotho.shards=FOLDER out=results

Prints the table and writes it as retrieval.json into out, which only the run's own evaluation done again does without:
it goes into the run folder. examples/SET/queries.png there shows what was found for a few queries
(evaluation.num_examples), queries.json says it, and their sounds lie beside it. data.validation.NAME.relevance is
`labels`, or a file that says which captions truly describe which clips. Other keys are the recipe's:
"""


def main() -> None:
    """Build the run's model, load its weights, evaluate every validation set."""
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    if not words or {"-h", "--help"} & set(words):
        print(HELP + configuration.describe(Recipe))
        return
    own = dict(word.split("=", 1) for word in words if word.startswith(("run=", "weights=", "out=")))
    if "run" not in own:
        raise UserError("no run to evaluate: give run=FOLDER")
    changes = [word for word in words if word.split("=", 1)[0] not in own]
    if "out" not in own and (changes or "weights" in own):
        raise UserError(f"what is asked for is not what {own['run']} was trained to: give out=FOLDER for the results")
    recipe = _read(Path(own["run"]), changes)
    if not recipe.data.validation:
        raise UserError("no set to evaluate: give data.validation.NAME.shards=FOLDER")
    end_with_launcher()
    world = World.from_environment()
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(message)s", force=True)
    sets = open_sets(recipe.data.validation, recipe.data, frames=needs_pictures(recipe), captions="text" in recipe.task)
    check_sets(recipe.task, recipe.data.validation, sets)
    model = _build(recipe, own["run"], own.get("weights", own["run"]))
    encoders = replaced_encoders(recipe, model)
    features = [
        features_of(recipe, encoders, {name: chosen}, [shards])
        for (name, chosen), shards in zip(recipe.data.validation.items(), sets, strict=True)
    ]
    if world.size > 1:
        start_process_group(world)
    model = model.to(world.device)
    results = [
        evaluate_set(
            model,
            recipe.task,
            shards,
            recipe.data,
            chosen,
            set_name=name,
            batch_size=recipe.evaluation.batch_size,
            frame=recipe.evaluation.frame,
            world=world,
            features=known,
            num_examples=recipe.evaluation.num_examples,
        )
        for (name, chosen), shards, known in zip(recipe.data.validation.items(), sets, features, strict=True)
    ]
    stop_process_group()
    if world.is_main:
        _write(results, sets, recipe, Path(own["out"]) if "out" in own else run_folder(Path(own["run"])))
        print(report.table(results))


def _write(results: list[RetrievalResult], sets: list[list[Shard]], recipe: Recipe, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    report.write_results(results, out)
    for result, shards in zip(results, sets, strict=True):
        write_examples(result.examples, recipe.task, result.set_name, shards, recipe.data, out)


def _read(run: Path, changes: list[str]) -> Recipe:
    """The run's recipe; for another task without what only the run's own could use."""
    if any(word.startswith("task=") for word in changes):
        own_alone = ["loss.frame_match=one", "loss.frame_match_from_epoch=0", "evaluation.frame=middle"]
        own_alone += ["data.teachers={}", "loss.teacher_weight=0", "loss.pair_weight=1"]
        changes = [*own_alone, "data.frame_features=null", "data.caption_features=null", *changes]
    return read_run_recipe(run, changes)


def _build(recipe: Recipe, run: str, weights: str) -> DualEncoder:
    """The model with the run's weights; towers that the run has not come from model.TOWER.init or .pretrained."""
    config, has = recipe.model.without_weights(), read_run_recipe(Path(run)).task.split("-")
    if recipe.task.split("-") == has:
        model = build_model(config, recipe.task, recipe.data.sample_rate_hz, recipe.training.autocast_dtype)
        load_model(model, weights, ema=recipe.evaluation.ema)
        return model
    if not recipe.evaluation.ema:
        raise UserError(
            f"evaluation.ema=false with task={recipe.task}, which {run} was not trained for: give "
            "weights=RUN/checkpoints/STEP/model.safetensors"
        )
    for modality in set(recipe.task.split("-")) - set(has):
        tower = getattr(recipe.model, modality)
        if tower.init is None and tower.pretrained is None:
            raise UserError(
                f"{run} has no {modality} tower for task={recipe.task}: give model.{modality}.init or "
                f"model.{modality}.pretrained"
            )
    towers: dict[str, Any] = {
        modality: replace(getattr(config, modality), init=weights)
        if modality in has
        else getattr(recipe.model, modality)
        for modality in recipe.task.split("-")
    }
    return build_towers(replace(recipe, model=replace(config, init=None, **towers)))


if __name__ == "__main__":
    run_for_people(main)
