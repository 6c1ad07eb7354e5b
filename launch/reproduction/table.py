"""A table file: rows x seeds, each a chain of commands, and where its figures are found.

    title: Temporal agreement on the embedded world
    out: runs/tables/soundscape             # all that the table makes
    seeds: [0, 1, 2]
    variables: {recipes: launch/recipes/temporal_agreement/soundscape}
    prepare:                                # once, before all rows, in this order
      train: python -m shards.build soundscape split=train out=${out}/train media=${out}/media
    steps:                                  # for every row and seed, in this order
      pretrain: ${launch} launch/pretrain.py recipe=${recipes}/${row}.yaml training.seed=${seed} run_dir=${folder}/run
    columns:
      A->I R@1: {file: "${folder}/run/retrieval.json", metric: test/audio->image/R@1}
    rows:
      conventional: {title: VIP-ANT, paper: {A->I R@1: 10.94}}
      nearest: {after: [conventional], variables: {recipes: elsewhere}}
    differences:                            # of the same seed, the first row less the second
      Nearest Match, over VIP-ANT: [nearest, conventional]

A command is split into words as a shell would, but no shell sees it. ``${launch}`` is ``python``, or ``deepspeed`` with
its options where a job has several GPUs; ``${folder}`` is the folder of this row and seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from audiotext_dist import configuration
from audiotext_dist.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Column:
    """A figure of the table: a metric, SET/DIRECTION/METRIC, in a retrieval.json."""

    file: str = "???"
    metric: str = "???"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row: its title, variables of its own, and the paper's figures by column.

    after: rows that must have finished for the same seed. steps: in place of the table's.
    """

    title: str | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    after: list[str] = field(default_factory=list)
    steps: dict[str, str] = field(default_factory=dict)
    paper: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Lines:
    """A picture of lines in place of bars."""

    x: str = "???"
    line: str = "title"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table file; every key may be changed by a word, as in a recipe.

    name: of the files that show it, NAME.md, .json and .png in out; tables that share an out need one each.
    lines: draw the columns as lines over the variable ``x``, one for each value of ``line`` (a variable, or ``title``).
    only: rows to run, empty for all. jobs: rows at once, default one a GPU (or gpus_a_job of them), or one without.
    """

    title: str = "???"
    out: str = "???"
    name: str = "table"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    variables: dict[str, Any] = field(default_factory=dict)
    prepare: dict[str, str] = field(default_factory=dict)
    steps: dict[str, str] = field(default_factory=dict)
    columns: dict[str, Column] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)
    differences: dict[str, list[str]] = field(default_factory=dict)
    lines: Lines | None = None
    only: list[str] = field(default_factory=list)
    jobs: int | None = None
    gpus_a_job: int = 1

    def folder(self, row: str, seed: int) -> Path:
        """What a row leaves for a seed."""
        return Path(self.out) / row / f"seed-{seed}"

    def chosen_rows(self) -> list[str]:
        """The rows that are asked for, in the file's order."""
        return [name for name in self.rows if not self.only or name in self.only]

    def steps_of(self, row: str) -> dict[str, str]:
        """A row's commands by name, in order."""
        return self.rows[row].steps or self.steps

    def names_of(self, row: str, seed: int, **more: str) -> dict[str, Any]:
        """What the names in a row's commands stand for."""
        own = {"out": self.out, "row": row, "seed": seed, "folder": str(self.folder(row, seed))}
        return {**self.variables, **self.rows[row].variables, **own, **more}

    def title_of(self, row: str) -> str:
        """As the table shows it."""
        return self.rows[row].title or row

    def jobs_in_order(self) -> Iterator[tuple[str, int]]:
        """Every row and seed; a whole seed first, so that a table stands early."""
        return ((row, seed) for seed in self.seeds for row in self.chosen_rows())


def read_table(yaml_file: str, words: list[str]) -> Table:
    """The table of a file, with ``key=value`` changes.

    Raises:
        UserError: one line that names the key and the mend.
    """
    found = configuration.parse_unresolved(Table, words, yaml_file)
    known = configuration.parse_unresolved(Table, [], yaml_file)["variables"]
    if unknown := found["variables"].keys() - known.keys():
        raise UserError(f"{yaml_file} has no variables.{min(unknown)}: it has {', '.join(sorted(known))}")
    columns = {name: Column(**column) for name, column in found.pop("columns").items()}
    rows = {name: Row(**row) for name, row in found.pop("rows").items()}
    lines = found.pop("lines")
    table = Table(columns=columns, rows=rows, lines=lines and Lines(**lines), **found)
    _check(table, yaml_file)
    return table


def resolve(text: str, names: Mapping[str, Any], where: str) -> str:
    """The text with every ``${name}`` replaced.

    Raises:
        UserError: an unknown name.
    """
    try:
        return str(OmegaConf.create({**names, "_text": text})["_text"])
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{where}: {reason}; known names are {', '.join(sorted(names))}") from None


def _check(table: Table, yaml_file: str) -> None:
    if not table.rows or not table.seeds:
        raise UserError(f"{yaml_file} has no {'seeds' if table.rows else 'rows'}: give some")
    if (table.jobs is not None and table.jobs < 1) or table.gpus_a_job < 1:
        raise UserError(f"jobs={table.jobs} and gpus_a_job={table.gpus_a_job} must be above 0")
    for name in table.only:
        if name not in table.rows:
            raise UserError(f"only={name} is no row of {yaml_file}: the rows are {', '.join(table.rows)}")
    earlier: list[str] = []
    for name, row in table.rows.items():
        if not (row.steps or table.steps):
            raise UserError(f"row '{name}' of {yaml_file} has no steps: give steps, or rows.{name}.steps")
        for other in row.after:
            if other not in earlier:
                raise UserError(f"row '{name}' of {yaml_file} is after '{other}', which is no row above it")
        for column in row.paper:
            if column not in table.columns:
                raise UserError(f"row '{name}' of {yaml_file} has the paper's '{column}', which is no column")
        earlier.append(name)
    for title, pair in table.differences.items():
        if len(pair) != 2 or not set(pair) <= table.rows.keys():
            raise UserError(
                f"the difference '{title}' of {yaml_file} is [{', '.join(pair)}]: give two of {', '.join(table.rows)}"
            )
