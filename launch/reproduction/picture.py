"""A table as a picture: bars by row, or lines over a variable of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from audiotext_dist.errors import UserError
from launch.reproduction.cell import Cell, Summary
from launch.reproduction.table import Table, resolve

PANELS_A_LINE = 4


def draw(table: Table, summary: Summary, path: Path) -> None:
    """A panel a column, with chance as a dashed line.

    Raises:
        UserError: ``lines.x`` is no number of a row.
    """
    if not table.columns:
        return
    num_lines, num_columns = -(-len(table.columns) // PANELS_A_LINE), min(PANELS_A_LINE, len(table.columns))
    height = 2.6 if table.lines else 0.34 * len(summary) + 1.0
    figure = Figure(figsize=(3.0 * num_columns + 1.8, height * num_lines + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(num_lines, num_columns, squeeze=False, sharey=not table.lines).flatten()
    for axes, name in zip(panels, table.columns, strict=False):
        cells = {row: columns[name] for row, columns in summary.items()}
        if table.lines:
            _draw_lines(axes, table, cells)
        else:
            _draw_bars(axes, table, cells)
        axes.set_title(name)
    for axes in panels[len(table.columns) :]:
        axes.set_visible(False)
    if not table.lines:
        panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower right", ncols=len(handles))
    figure.suptitle(table.title)
    figure.savefig(path, dpi=120)


def _draw_bars(axes: Any, table: Table, cells: dict[str, Cell]) -> None:
    """Means with their deviation, the paper's figures as diamonds."""
    axes.barh(
        range(len(cells)),
        [cell.mean or 0.0 for cell in cells.values()],
        xerr=[cell.deviation or 0.0 for cell in cells.values()],
        color="#4c78a8",
        error_kw={"ecolor": "#333333", "capsize": 2},
    )
    told = [(cell.paper, place) for place, cell in enumerate(cells.values()) if cell.paper is not None]
    if told:
        axes.plot(*zip(*told, strict=True), "D", color="#e45756", markersize=5, label="paper")
    chance = _chance(list(cells.values()))
    if chance is not None:
        axes.axvline(chance, color="#333333", linestyle="--", linewidth=1, label="chance")
    axes.set(xlabel="per cent", yticks=range(len(cells)))
    axes.set_yticklabels([table.title_of(row) for row in cells])
    axes.grid(axis="x", alpha=0.3)


def _draw_lines(axes: Any, table: Table, cells: dict[str, Cell]) -> None:
    """Means with their deviation over ``lines.x``, a line for each value of ``lines.line``."""
    assert table.lines is not None
    points: dict[str, list[tuple[float, Cell]]] = {}
    for row, cell in cells.items():
        names = table.names_of(row, table.seeds[0], title=table.title_of(row))
        x, line = (resolve(f"${{{name}}}", names, "lines") for name in (table.lines.x, table.lines.line))
        try:
            points.setdefault(line, []).append((float(x), cell))
        except ValueError:
            raise UserError(f"lines.x={table.lines.x} is '{x}' in row '{row}', which is no number") from None
    for line, found in points.items():
        shown = sorted(((x, cell) for x, cell in found if cell.by_seed), key=lambda point: point[0])
        axes.errorbar(
            [x for x, _ in shown],
            [cell.mean for _, cell in shown],
            yerr=[cell.deviation or 0.0 for _, cell in shown],
            marker="o",
            capsize=2,
            label=line,
        )
    chance = _chance(list(cells.values()))
    if chance is not None:
        axes.axhline(chance, color="#333333", linestyle="--", linewidth=1, label="chance")
    axes.set(xlabel=table.lines.x, ylabel="per cent")
    axes.grid(alpha=0.3)


def _chance(cells: Sequence[Cell]) -> float | None:
    return next((cell.chance for cell in cells if cell.chance is not None), None)
