"""Contenders that go over the same clips, side by side: CPU time and the clock of one pass.

They take turns in rounds of a short and a long run, and what starting takes is subtracted: each one's best long run
less its best short one. The best of the differences would be that of a round whose short run was disturbed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tests.bench.bench_build import cpu_seconds

NUM_ROUNDS = 3
FEW, MANY = 1, 3


class Passes(NamedTuple):
    """a_pass: seconds of one pass, of each contender. spread: see ``of_runs``."""

    a_pass: list[float]
    spread: float

    @classmethod
    def of_runs(cls, seconds_RCP: NDArray[np.float64]) -> Passes:
        """Of R rounds, C contenders and P = 2 runs of each, of FEW passes and of MANY.

        The spread is how much longer than its best a contender's slowest long run took, of the worst contender.
        """
        few_C, many_C = seconds_RCP.min(axis=0).T
        slowest_C = seconds_RCP[:, :, 1].max(axis=0)
        return cls(((many_C - few_C) / (MANY - FEW)).tolist(), float((slowest_C / many_C).max()) - 1)


def measure_passes(contenders: Sequence[Callable[[int], None]]) -> tuple[Passes, Passes]:
    """CPU time, and the clock; a contender takes the number of passes."""
    seconds_RCPK = np.array(
        [
            [[both_seconds(partial(run, passes)) for passes in (FEW, MANY)] for run in contenders]
            for _ in range(NUM_ROUNDS)
        ]
    )
    return Passes.of_runs(seconds_RCPK[..., 0]), Passes.of_runs(seconds_RCPK[..., 1])


def both_seconds(work: Callable[[], None]) -> tuple[float, float]:
    """CPU time of this process and all that it starts, and the clock."""
    clock = list[float]()

    def timed() -> None:
        start = time.perf_counter()
        work()
        clock.append(time.perf_counter() - start)

    return cpu_seconds(timed), clock[0]
