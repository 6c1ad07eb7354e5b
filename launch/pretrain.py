"""Train any recipe: ``deepspeed launch/pretrain.py recipe=launch/recipes/....yaml key=value ...``."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

from audiotext_dist import configuration
from audiotext_dist.errors import run_for_people
from audiotext_dist.training.preemption import StopRequest

HELP = """Train a recipe on every process the launcher starts.

    deepspeed launch/pretrain.py recipe=FILE.yaml [key=value ...]
    deepspeed --num_accelerators 2 launch/pretrain.py recipe=launch/recipes/soundscape/audio_text.yaml

A run leaves in its folder (run_dir): recipe.yaml, the resolved recipe; deepspeed.json, what DeepSpeed was told;
metrics.jsonl; checkpoints/; retrieval.json, the last evaluation; loss.png. Go on after a stop with
training.resume=auto.

SIGTERM or SIGUSR1 to a rank ends the run with a checkpoint and exit code 75; `python -m launch.run` in the place of
`deepspeed` passes them on and keeps that code (docs/clusters.md).

Keys and their defaults:
"""


def main() -> None:
    """Read the recipe, check it, train it, print the table."""
    # First of all, before anything that takes its time: the launcher may end meanwhile.
    stop = StopRequest()
    from audiotext_dist.distributed import World
    from audiotext_dist.training.recipe import Recipe, read_recipe

    words = sys.argv[1:]
    if not words or {"-h", "--help"} & set(words):
        print(HELP + configuration.describe(Recipe))
        return
    world = World.from_environment()
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(message)s", force=True)
    logging.getLogger("audiotext_dist").setLevel(logging.INFO if world.is_main else logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)
    recipe = read_recipe(words)
    # Only now, since DeepSpeed takes its time: a misspelt key is told before.
    from audiotext_dist.evaluation import report
    from audiotext_dist.training.engine import lost_contact, stop_process_group
    from audiotext_dist.training.heartbeat import EXIT_LOST
    from audiotext_dist.training.loop import train
    from audiotext_dist.training.prepare import prepare

    prepared = prepare(recipe, world)
    try:
        results = train(prepared, stop)
    except SystemExit:
        # Asked to stop: every rank leaves here.
        stop_process_group()
        raise
    except RuntimeError as error:
        if not lost_contact(error):
            raise
        # What went wrong is told by the rank where it did; a port that is taken, by nobody else.
        reason = str(error).partition("\n")[0]
        sys.stderr.write(f"error: rank {world.rank} ends, since another rank has left or does not answer ({reason})\n")
        # Not an orderly exit, which would wait for that rank again.
        os._exit(EXIT_LOST)
    stop_process_group()
    if world.is_main:
        if results:
            print(f"\n{report.table(results)}")
        print(f"\nrun folder: {Path(prepared.recipe.run_dir).resolve()}")


if __name__ == "__main__":
    run_for_people(main)
