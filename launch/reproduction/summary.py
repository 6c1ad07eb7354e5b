"""What a table shows: mean and deviation over the seeds, beside the paper's figures and chance."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from audiotext_dist import storage
from audiotext_dist.errors import UserError
from launch.reproduction.table import Column, Table, resolve


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A figure of one row, all in per cent: of each seed that is there, by chance, and in the paper."""

    by_seed: dict[int, float]
    chance: float | None
    paper: float | None

    @property
    def mean(self) -> float | None:
        """Over the seeds; None without any."""
        return statistics.fmean(self.by_seed.values()) if self.by_seed else None

    @property
    def deviation(self) -> float | None:
        """The sample's standard deviation; None with fewer than two seeds."""
        return statistics.stdev(self.by_seed.values()) if len(self.by_seed) > 1 else None

    def text(self) -> str:
        """``12.34 ± 0.56 [10.94]``, the paper's in brackets."""
        shown = "-" if self.mean is None else f"{self.mean:.2f}"
        shown += "" if self.deviation is None else f" ± {self.deviation:.2f}"
        return shown + ("" if self.paper is None else f" [{self.paper:.2f}]")


Summary = dict[str, dict[str, Cell]]


def summarise(table: Table) -> Summary:
    """Row -> column -> cell, from what the rows have left so far.

    Raises:
        UserError: a file is there without the metric.
    """
    return {
        row: {name: _cell(table, row, name, column) for name, column in table.columns.items()}
        for row in table.chosen_rows()
    }


def _cell(table: Table, row: str, name: str, column: Column) -> Cell:
    found = {}
    for seed in table.seeds:
        names = table.names_of(row, seed)
        file, metric = (resolve(text, names, f"columns.{name}") for text in (column.file, column.metric))
        if Path(file).is_file():
            found[seed] = read_metric(Path(file), metric)
    return Cell(
        by_seed={seed: value for seed, (value, _) in found.items()},
        chance=next((chance for _, chance in found.values()), None),
        paper=table.rows[row].paper.get(name),
    )


def read_metric(file: Path, metric: str) -> tuple[float, float]:
    """A metric, SET/DIRECTION/METRIC, of a retrieval.json and its chance, in per cent."""
    try:
        set_name, direction, key = metric.split("/")
        results = {result["set_name"]: result for result in json.loads(file.read_text())}
        found: Mapping[str, Any] = results[set_name]["directions"][direction]
        return 100 * found["metrics"][key], 100 * found["chance"][key]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} holds no '{metric}': write SET/DIRECTION/METRIC, as test/audio->text/R@1") from None


def as_markdown(table: Table, summary: Summary) -> str:
    """The table, columns aligned."""
    head = ["", "seeds", *table.columns]
    lines = [
        [
            table.rows[row].title or row,
            f"{_num_seeds(cells)}/{len(table.seeds)}",
            *(cell.text() for cell in cells.values()),
        ]
        for row, cells in summary.items()
    ]
    chances = [
        next((cells[name].chance for cells in summary.values() if cells[name].chance is not None), None)
        for name in table.columns
    ]
    lines.append(["chance", "", *("-" if chance is None else f"{chance:.2f}" for chance in chances)])
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    drawn = [
        "| " + " | ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)) + " |"
        for line in (head, *lines)
    ]
    drawn.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    has_paper = any(cell.paper is not None for cells in summary.values() for cell in cells.values())
    note = "per cent, mean ± standard deviation over the seeds" + ("; in brackets the paper's" if has_paper else "")
    return "\n".join([f"{table.title}: {note}", "", *drawn]) + "\n"


def _num_seeds(cells: Mapping[str, Cell]) -> int:
    return min((len(cell.by_seed) for cell in cells.values()), default=0)


def write_summary(table: Table, summary: Summary, failed: Mapping[str, str]) -> str:
    """``table.md``, ``table.json`` and ``table.png`` in the table's folder; the text of the first."""
    text = as_markdown(table, summary)
    content = {
        "title": table.title,
        "rows": {
            row: {
                name: {**asdict(cell), "mean": cell.mean, "deviation": cell.deviation} for name, cell in cells.items()
            }
            for row, cells in summary.items()
        },
        "failed": dict(failed),
    }
    out = Path(table.out)
    storage.write_bytes(str(out / "table.md"), text.encode())
    storage.write_bytes(str(out / "table.json"), (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    _draw(table, summary, out / "table.png")
    return text


def _draw(table: Table, summary: Summary, path: Path) -> None:
    """A panel a column: bars with their deviation, the paper's figure as a diamond, chance as a dashed line."""
    num_rows, num_columns = len(summary), min(4, len(table.columns))
    num_lines = -(-len(table.columns) // max(num_columns, 1))
    figure = Figure(figsize=(3.0 * num_columns + 1.8, (0.34 * num_rows + 1.0) * num_lines), layout="constrained")
    FigureCanvasAgg(figure)
    if not table.columns:
        return
    panels = figure.subplots(num_lines, num_columns, squeeze=False, sharey=True).flatten()
    for axes, name in zip(panels, table.columns, strict=False):
        cells = [cells[name] for cells in summary.values()]
        axes.barh(
            range(num_rows),
            [cell.mean or 0.0 for cell in cells],
            xerr=[cell.deviation or 0.0 for cell in cells],
            color="#4c78a8",
            error_kw={"ecolor": "#333333", "capsize": 2},
        )
        told = [(cell.paper, place) for place, cell in enumerate(cells) if cell.paper is not None]
        if told:
            axes.plot(*zip(*told, strict=True), "D", color="#e45756", markersize=5, label="paper")
        chance = next((cell.chance for cell in cells if cell.chance is not None), None)
        if chance is not None:
            axes.axvline(chance, color="#333333", linestyle="--", linewidth=1, label="chance")
        axes.set(title=name, xlabel="per cent", yticks=range(num_rows))
        axes.set_yticklabels([table.rows[row].title or row for row in summary])
        axes.grid(axis="x", alpha=0.3)
    for axes in panels[len(table.columns) :]:
        axes.set_visible(False)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower right", ncols=len(handles))
    figure.suptitle(table.title)
    figure.savefig(path, dpi=120)
