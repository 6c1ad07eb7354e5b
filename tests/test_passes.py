"""What the benchmarks make of their runs."""

import numpy as np
import pytest

from tests.bench.passes import Passes, measure_passes


def test_a_disturbed_run_makes_no_contender_faster() -> None:
    """Two seconds to start and one a pass; the second contender's short run of round 1 was held up."""
    quiet = [[3.0, 5.0], [3.0, 5.0]]
    disturbed = [[3.0, 5.0], [4.5, 5.0]]
    found = Passes.of_runs(np.array([quiet, disturbed, [[3.0, 5.5], [3.0, 5.0]]]))
    assert found.a_pass == [1.0, 1.0]
    assert found.spread == pytest.approx(0.1)


def test_each_contender_runs_short_and_long_in_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    # The real one waits for every child of this process.
    monkeypatch.setattr("tests.bench.passes.cpu_seconds", lambda work: work() or 1.0)
    ran: list[tuple[str, int]] = []
    cpu, clock = measure_passes([lambda passes: ran.append(("a", passes)), lambda passes: ran.append(("b", passes))])
    assert ran == [("a", 1), ("a", 3), ("b", 1), ("b", 3)] * 3
    assert len(cpu.a_pass) == len(clock.a_pass) == 2
