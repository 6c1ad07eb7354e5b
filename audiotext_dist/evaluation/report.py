"""What a person sees of an evaluation: a table, a JSON file, a picture of the loss."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from audiotext_dist import storage
from audiotext_dist.evaluation.metrics import MAP_AT, RECALL_AT
from audiotext_dist.evaluation.retrieval import RetrievalResult

RESULTS_FILE = "retrieval.json"
LOSS_PICTURE = "loss.png"
_COLUMNS = [*(f"R@{k}" for k in RECALL_AT), f"mAP@{MAP_AT}"]


def table(results: Sequence[RetrievalResult]) -> str:
    """The retrieval table in per cent, chance in brackets."""
    lines = []
    for result in results:
        width = max(len(name) for name in result.directions)
        of_which = f"{result.num_clips} clips" if result.coverage is None else str(result.coverage)
        if result.num_relevance_clips is not None and result.num_relevance_clips > result.num_clips:
            of_which += f", of {result.num_relevance_clips:,} that its relevance file names"
        lines.append(f"{result.set_name}: {of_which}; per cent (chance)")
        lines.append(f"{'':{width}}  {'queries':>7}  {'items':>6}" + "".join(f"{name:>16}" for name in _COLUMNS))
        for name, direction in result.directions.items():
            cells = (
                f"{100 * direction.metrics[column]:.2f} ({100 * direction.chance[column]:.2f})" for column in _COLUMNS
            )
            lines.append(
                f"{name:{width}}  {direction.num_queries:>7}  {direction.num_items:>6}"
                + "".join(f"{cell:>16}" for cell in cells)
            )
    return "\n".join(lines)


def flat_metrics(result: RetrievalResult) -> dict[str, float]:
    """``validation/<set>/<direction>/<metric>`` -> value, for the tracker."""
    return {
        f"validation/{result.set_name}/{name}/{metric}": value
        for name, direction in result.directions.items()
        for metric, value in direction.metrics.items()
    }


def write_results(results: Sequence[RetrievalResult], run_dir: Path) -> None:
    """``retrieval.json`` in the run folder."""
    # The examples have a file of their own.
    lines = [{name: value for name, value in asdict(result).items() if name != "examples"} for result in results]
    content = json.dumps(lines, indent=1)
    storage.write_bytes(str(run_dir / RESULTS_FILE), (content + "\n").encode())


def draw_loss(metrics: Sequence[Mapping[str, float]], run_dir: Path) -> Path | None:
    """``loss.png`` in the run folder: training loss and in-batch R@1 over the steps; None without any."""
    lines = [line for line in metrics if "train/loss" in line]
    if not lines:
        return None
    steps = [line["trainer/step"] for line in lines]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot(steps, [line["train/loss"] for line in lines])
    left.set(xlabel="step", title="training loss")
    right.plot(steps, [100 * line["train/recall_at_1"] for line in lines])
    right.set(xlabel="step", title="in-batch R@1, per cent", ylim=(0, 100))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(run_dir / LOSS_PICTURE, dpi=120)
    return run_dir / LOSS_PICTURE
