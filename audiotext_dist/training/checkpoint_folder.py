"""The folder of a run's checkpoints: names, which one is whole, which one is the best. See checkpoint.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from audiotext_dist import storage
from audiotext_dist.distributed import World
from audiotext_dist.errors import UserError

CHECKPOINTS = "checkpoints"
RECIPE_FILE = "recipe.yaml"
DEEPSPEED_FILE = "deepspeed.json"
MANIFEST = "manifest.json"
BEST = "best"
BEST_FILE = "best.json"


def name_of(step: int) -> str:
    """The folder's name of a step's checkpoint; names sort as steps do."""
    return f"step-{step:08d}"


def named_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints that have their name, whole or damaged since, newest first."""
    return sorted((run_dir / CHECKPOINTS).glob("step-*"), reverse=True)


def newest_whole(run_dir: Path) -> Path | None:
    """The newest checkpoint that this process finds whole, or None."""
    return next((found for found in named_checkpoints(run_dir) if is_whole(found, World())), None)


def run_folder(source: Path) -> Path:
    """Of a run, or of one of its checkpoints."""
    return source.parents[1] if source.parent.name == CHECKPOINTS else source


def weights_folder(source: Path) -> Path:
    """Where the weights lie that a run folder (its newest whole checkpoint), RUN/checkpoints/best, a checkpoint or an
    export stands for.

    Raises:
        UserError: the run remembers no best checkpoint.
    """
    if source.name == BEST and source.parent.name == CHECKPOINTS:
        best = best_of(source.parents[1])
        if best is None:
            raise UserError(
                f"no best checkpoint at {source}: train with checkpoint.best_metric, or give the run folder"
            )
        return source.parent / str(best["name"])
    return newest_whole(source) or source


def best_of(run_dir: Path) -> dict[str, Any] | None:
    """Name, metric and value of the best checkpoint, while there is one of that name."""
    try:
        found: dict[str, Any] = json.loads((run_dir / CHECKPOINTS / BEST_FILE).read_text())
        return found if (run_dir / CHECKPOINTS / found["name"]).is_dir() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def has_checkpoints(run_dir: Path) -> bool:
    """True when the run folder holds a checkpoint, whole or not."""
    return bool(named_checkpoints(run_dir))


def describe_files(folder: Path) -> dict[str, dict[str, str | int]]:
    """What a manifest says of each file: its bytes and SHA-256."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": storage.sha256_of(path)}
        for path in files
    }


def is_whole(checkpoint: Path, world: World) -> bool:
    """Whether every file has its manifest's size, and this rank's share of them its digest."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        for number, (name, expected) in enumerate(sorted(manifest.items())):
            path = checkpoint / name
            if path.stat().st_size != expected["bytes"]:
                return False
            if number % world.size == world.rank and storage.sha256_of(path) != expected["sha256"]:
                return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return True
