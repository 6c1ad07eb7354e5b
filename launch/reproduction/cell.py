"""One figure of a table, over its seeds."""

from __future__ import annotations

import statistics
from dataclasses import dataclass


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

    def less(self, other: Cell) -> Cell:
        """The difference of the seeds that both have, which no seed's own luck widens."""
        both = self.by_seed.keys() & other.by_seed.keys()
        return Cell(
            by_seed={seed: self.by_seed[seed] - other.by_seed[seed] for seed in sorted(both)},
            chance=None,
            paper=None if self.paper is None or other.paper is None else self.paper - other.paper,
        )

    def text(self, sign: str = "") -> str:
        """``12.34 ± 0.56 [10.94]``, the paper's in brackets; with ``sign="+"`` as a difference."""
        shown = "-" if self.mean is None else f"{self.mean:{sign}.2f}"
        shown += "" if self.deviation is None else f" ± {self.deviation:.2f}"
        return shown + ("" if self.paper is None else f" [{self.paper:{sign}.2f}]")


Summary = dict[str, dict[str, Cell]]
