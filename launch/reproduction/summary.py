"""What a table shows: mean and deviation over the seeds, beside the paper's figures and chance."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from audiotext_dist import storage
from audiotext_dist.errors import UserError
from launch.reproduction.cell import Cell, Summary
from launch.reproduction.picture import draw
from launch.reproduction.runner import is_through
from launch.reproduction.table import Column, Table, resolve


def summarise(table: Table) -> Summary:
    """Row -> column -> cell, of the rows and seeds that are through: a run writes figures long before its end.

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
        if is_through(table, row, seed) and Path(file).is_file():
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


def differences(table: Table, summary: Summary) -> Summary:
    """What the table asks for, title -> column -> cell, of rows that are both in the summary."""
    return {
        title: {name: summary[row][name].less(summary[other][name]) for name in table.columns}
        for title, (row, other) in table.differences.items()
        if row in summary and other in summary
    }


def as_markdown(table: Table, summary: Summary) -> str:
    """The table, columns aligned; below it the differences that it asks for."""
    lines = [_line(table, table.title_of(row), cells) for row, cells in summary.items()]
    chances = [
        next((cells[name].chance for cells in summary.values() if cells[name].chance is not None), None)
        for name in table.columns
    ]
    lines.append(["chance", "", *("-" if chance is None else f"{chance:.2f}" for chance in chances)])
    has_paper = any(cell.paper is not None for cells in summary.values() for cell in cells.values())
    note = "per cent, mean ± standard deviation over the seeds" + ("; in brackets the paper's" if has_paper else "")
    head = ["seeds", *table.columns]
    drawn = [f"{table.title}: {note}", "", *_aligned(["", *head], lines)]
    if found := differences(table, summary):
        lines = [_line(table, title, cells, sign="+") for title, cells in found.items()]
        drawn += ["", *_aligned(["differences of the same seed", *head], lines)]
    return "\n".join(drawn) + "\n"


def _line(table: Table, title: str, cells: Mapping[str, Cell], sign: str = "") -> list[str]:
    return [title, f"{_num_seeds(cells)}/{len(table.seeds)}", *(cell.text(sign) for cell in cells.values())]


def _aligned(head: list[str], lines: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    drawn = [
        "| " + " | ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)) + " |"
        for line in (head, *lines)
    ]
    return [drawn[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *drawn[1:]]


def _num_seeds(cells: Mapping[str, Cell]) -> int:
    return min((len(cell.by_seed) for cell in cells.values()), default=0)


def write_summary(table: Table, summary: Summary, failed: Mapping[str, str]) -> str:
    """``NAME.md``, ``NAME.json`` and ``NAME.png`` in the table's folder; the text of the first."""
    text = as_markdown(table, summary)
    content = {
        "title": table.title,
        "rows": _as_plain(summary),
        "differences": _as_plain(differences(table, summary)),
        "failed": dict(failed),
    }
    markdown, plain, picture = (Path(table.out) / f"{table.name}.{suffix}" for suffix in ("md", "json", "png"))
    storage.write_bytes(str(markdown), text.encode())
    storage.write_bytes(str(plain), (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    draw(table, summary, picture)
    return text


def _as_plain(summary: Summary) -> dict[str, dict[str, dict[str, Any]]]:
    return {
        row: {name: {**asdict(cell), "mean": cell.mean, "deviation": cell.deviation} for name, cell in cells.items()}
        for row, cells in summary.items()
    }
