"""An export where there is no DeepSpeed; a module of its own, so that nothing else of the tests imports it."""

from __future__ import annotations

import sys
from pathlib import Path

from audiotext_dist.models.dual_encoder import build_model
from audiotext_dist.training.recipe import read_run_recipe
from audiotext_dist.training.weights import load_model
from launch import export


def export_and_load(rank: int, run: Path, out: Path) -> None:
    """Export a run, then build the export's model with its weights."""
    assert "deepspeed" not in sys.modules
    sys.modules["deepspeed"] = None  # type: ignore[assignment]  # whatever imports it later fails
    sys.argv = ["export", f"run={run}", f"out={out}"]
    export.main()
    recipe = read_run_recipe(out)
    model = build_model(recipe.model.without_weights(), recipe.task, recipe.data.sample_rate_hz)
    load_model(model, str(out))
