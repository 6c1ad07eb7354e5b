"""Make the project's W&B workspace: ``python launch/dashboard.py run=runs/NAME``."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from audiotext_dist.errors import UserError, run_for_people
from audiotext_dist.evaluation.retrieval import direction_names
from audiotext_dist.training.recipe import Recipe, read_run_recipe

HELP = """Make a W&B workspace that shows runs like this one, in sections: loss, retrieval, optimisation, data, system.

    python launch/dashboard.py run=runs/NAME entity=WHO [project=PROJECT]

Needs `pip install wandb-workspaces` and `wandb login`; prints the workspace's address. What it shows stands in
launch/dashboard.yaml. The sets, directions and rates are those of the run; default project: the run's own.
"""
DEFINITION = Path(__file__).with_name("dashboard.yaml")
_OWN_WORDS = ("run", "entity", "project")


def main() -> None:
    """Read the run's recipe and the definition, save the workspace."""
    words = sys.argv[1:]
    if not words or {"-h", "--help"} & set(words):
        print(HELP)
        return
    own = dict(word.partition("=")[::2] for word in words)
    unknown = next((word for word in own if word not in _OWN_WORDS), None)
    if unknown is not None or "run" not in own:
        raise UserError(f"unknown word {unknown!r}" if unknown else "no run to show: give run=FOLDER")
    recipe = read_run_recipe(Path(own["run"]))
    entity = own.get("entity") or recipe.tracker.entity
    if not entity:
        raise UserError("no owner of the workspace: give entity=, your user or team at W&B")
    made = workspace(recipe, entity, own.get("project") or recipe.tracker.project)
    try:
        made.save()
    # Of the network, of W&B, of a key that is missing: all of them end here, and say what they are.
    except Exception as error:
        raise UserError(
            f"W&B did not take the workspace ({error}): check `wandb login`, entity= and project="
        ) from None
    print(made.url)


def workspace(recipe: Recipe, entity: str, project: str) -> Any:
    """The ``wandb_workspaces`` workspace of the definition, not saved yet.

    Raises:
        UserError: the package is not installed.
    """
    try:
        from wandb_workspaces import workspaces
    except ImportError:
        raise UserError("no package wandb_workspaces: pip install wandb-workspaces") from None
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name="audiotext-dist",
        sections=[
            workspaces.Section(name=name, is_open=True, panels=[_drawn(panel) for panel in panels])
            for name, panels in described(recipe).items()
        ],
    )


def described(recipe: Recipe) -> dict[str, list[dict[str, Any]]]:
    """Section -> panels of the definition, with the run's own sets, directions, rates and frames in their places."""
    directions = {name: direction_names(recipe.task, own.relevance) for name, own in recipe.data.validation.items()}
    # As build_optimizer names the groups with a factor.
    scales = ["", *(f"_x{scale:g}" for scale in sorted(set(recipe.optim.lr_scales.values()) - {1.0}))]
    frames = [str(number) for number in range(recipe.data.num_frames)]
    sections: dict[str, list[dict[str, Any]]] = yaml.safe_load(DEFINITION.read_text(encoding="utf-8"))
    return {
        name: [filled for panel in panels for filled in _filled(panel, directions, scales, frames)]
        for name, panels in sections.items()
    }


def _filled(
    panel: dict[str, Any], directions: Mapping[str, Sequence[str]], scales: Sequence[str], frames: Sequence[str]
) -> list[dict[str, Any]]:
    """A panel a set, where it names one; its lines for every direction of that set, factor and frame."""
    found = []
    for name, own in directions.items() if "{set}" in str(panel) else [("", [""])]:
        texts = {key: value.format(set=name) for key, value in panel.items() if isinstance(value, str)}
        lines = [
            line.format(set=name, direction=direction, scale=scale, frame=frame)
            for line, direction, scale, frame in itertools.product(panel.get("y", []), own, scales, frames)
        ]
        found.append({**panel, **texts, "y": list(dict.fromkeys(lines))})
    return found


def _drawn(panel: dict[str, Any]) -> Any:
    from wandb_workspaces.reports.v2 import interface

    match panel:
        case {"table": name}:
            return interface.WeavePanelSummaryTable(table_name=name)
        case {"media": name}:
            return interface.MediaBrowser(title=panel["title"], media_keys=[name], num_columns=1)
    return interface.LinePlot(
        title=panel["title"],
        x="trainer/step",
        y=panel["y"],
        title_x="step",
        title_y=panel.get("unit"),
        log_y=panel.get("log_y"),
    )


if __name__ == "__main__":
    run_for_people(main)
