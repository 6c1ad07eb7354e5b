"""A loss or a gradient that is not finite, on one rank: every rank skips the step, and goes on as if it never was."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest

from audiotext_dist.distributed import World
from audiotext_dist.errors import UserError
from audiotext_dist.training import loss_scale
from audiotext_dist.training.health import SPIKE_WINDOW, Health, HealthWatch
from tests.ranks import run_on_ranks
from tests.training.runs import Fault, Ran, train_many, write_training_set

INF, NAN = float("inf"), float("nan")


FAULTS = [
    Fault(step=3, rank=1, kind="loss", value=NAN),
    Fault(step=4, rank=0, kind="gradient", value=NAN),
    Fault(step=6, rank=1, kind="gradient", value=INF),
    Fault(step=7, rank=1, kind="loss", value=INF),
    Fault(step=8, rank=0, kind="gradient", value=1e30),  # finite, but its squares are not
]
OVERFLOW = [Fault(step=2, rank=1, kind="gradient", value=INF)]
TOO_MANY = [Fault(step=step, rank=1, kind="loss") for step in (2, 4, 5, 6)]


def train_with_quick_scales(rank: int, runs: Sequence[tuple[Sequence[str], Sequence[Fault]]]) -> list[Ran]:
    with mock.patch.object(loss_scale, "GROWTH_STEPS", 2):
        return train_many(rank, runs)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Ran]]:
    """Each run, as both ranks saw it."""
    folder = tmp_path_factory.mktemp("sick")
    clips = write_training_set(folder / "train")
    common = [f"data.train.own.shards={clips}", "training.max_steps=9", "training.ema_decay=0.9"]
    words = {
        "zero0": ([*common, f"run_dir={folder / 'zero0'}"], FAULTS),
        "zero1": ([*common, f"run_dir={folder / 'zero1'}", "engine.zero_stage=1"], FAULTS),
        "zero2": ([*common, f"run_dir={folder / 'zero2'}", "engine.zero_stage=2"], FAULTS),
        # Rank 0's own loss is finite where rank 1's is not: no softmax joins its columns over the ranks.
        "sigmoid": (
            [*common, f"run_dir={folder / 'sigmoid'}", "loss.name=sigmoid", "model.init_logit_bias=-10"],
            FAULTS,
        ),
        "ended": ([*common, f"run_dir={folder / 'ended'}", "training.max_sick_steps_in_a_row=2"], TOO_MANY),
    }
    fp16 = [*common, "training.precision=fp16", "training.max_sick_steps_in_a_row=0"]
    for zero_stage in (0, 1, 2):
        own = [f"run_dir={folder / f'fp16-{zero_stage}'}", f"engine.zero_stage={zero_stage}", "training.max_steps=5"]
        words[f"fp16 zero{zero_stage}"] = ([*fp16, *own], OVERFLOW)
    own = [f"run_dir={folder / 'fp16-stopped'}", "engine.zero_stage=1"]
    words["fp16 stopped"] = ([*fp16, *own, "training.max_steps=3"], OVERFLOW)
    words["fp16 resumed"] = ([*fp16, *own, "training.max_steps=5"], [])
    ran = run_on_ranks(train_with_quick_scales, 2, list(words.values()))
    return dict(zip(words, zip(*ran, strict=True), strict=True))


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "sigmoid"])
def test_all_ranks_skip_what_one_rank_met(runs: dict[str, list[Ran]], name: str) -> None:
    for each in runs[name]:
        assert each.error is None
        # Weights, their averages and optimizer stand still at these steps, and at no other.
        changed = [before != after for before, after in zip(each.states, each.states[1:], strict=False)]
        assert changed == [True, False, False, True, False, False, False, True]
    metrics = runs[name][0].metrics
    assert (metrics[-1]["health/num_sick_losses"], metrics[-1]["health/num_sick_gradients"]) == (2, 3)
    assert metrics[-1]["health/num_skipped"] == 5
    # The schedule counts updates (four warm-up steps to a peak of 3e-3), and the fourth update is the ninth batch's.
    rates = [line["optim/weight_lr"] for line in metrics]
    assert rates == pytest.approx([3e-3 * share / 4 for share in (1, 2, 3, 3, 3, 4, 4, 4, 4)])
    assert all(math.isfinite(value) for line in metrics for value in line.values())


def test_too_many_in_a_row_end_the_run_and_name_the_clips(runs: dict[str, list[Ran]]) -> None:
    for each in runs["ended"]:
        assert len(each.states) == 6
        assert each.error is not None
        assert "the loss of step 6 is not right" in each.error
        file = re.search(r"the batch's clips: (\S+)\)", each.error)
        assert file is not None
    found = json.loads(Path(file[1]).read_text())
    assert (found["step"], found["sickness"]) == (6, "loss")
    assert [len(keys) for keys in found["keys_of_ranks"]] == [6, 6]
    assert len({key for keys in found["keys_of_ranks"] for key in keys}) == 12


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_an_fp16_overflow_halves_the_loss_scale_and_is_no_sick_step(
    runs: dict[str, list[Ran]], zero_stage: int
) -> None:
    for each in runs[f"fp16 zero{zero_stage}"]:
        assert each.error is None
        changed = [before != after for before, after in zip(each.states, each.states[1:], strict=False)]
        assert changed == [False, True, True, True]
    metrics = runs[f"fp16 zero{zero_stage}"][0].metrics
    assert [line["optim/loss_scale"] for line in metrics] == [65536, 65536, 32768, 32768, 65536]
    assert (metrics[-1]["health/num_overflows"], metrics[-1]["health/num_sick_gradients"]) == (1, 0)


def test_an_fp16_run_that_goes_on_has_its_loss_scale_again(runs: dict[str, list[Ran]]) -> None:
    for whole, resumed in zip(runs["fp16 zero1"], runs["fp16 resumed"], strict=True):
        assert resumed.states == whole.states[3:]
        assert resumed.losses == whole.losses
        assert [line["optim/loss_scale"] for line in resumed.metrics] == [65536, 65536, 32768, 32768, 65536]


def watch(tmp_path: Path, **words: object) -> HealthWatch:
    given = {"spike_ratio": 2.0, "skip_spikes": False, "max_sick_in_a_row": 2, **words}
    return HealthWatch(Health(), run_dir=tmp_path, **given)  # type: ignore[arg-type]


def feed(health: HealthWatch, *losses: float) -> list[str | None]:
    judged = []
    for step, loss in enumerate(losses):
        sickness = health.judge_loss(loss)
        health.note(step + 1, loss, sickness, ["a"], World())
        judged.append(sickness)
    return judged


def test_a_spike_is_judged_by_the_median_of_enough_losses(tmp_path: Path) -> None:
    health = watch(tmp_path)
    assert feed(health, *[9.0] * (SPIKE_WINDOW - 1), 90.0) == [None] * SPIKE_WINDOW
    assert feed(health, 18.0, 18.1, 9.0) == [None, "spike", None]
    assert (health.health.num_spikes, health.health.num_skipped) == (1, 0)
    assert watch(tmp_path, spike_ratio=None).judge_loss(1e9) is None


def test_a_run_that_is_stopped_again_and_again_ends_of_sick_steps_all_the_same(tmp_path: Path) -> None:
    health = watch(tmp_path)
    feed(health, NAN, NAN)
    resumed = watch(tmp_path)
    resumed.health = health.health  # as the checkpoint tells it
    with pytest.raises(UserError, match="3 steps in a row were skipped"):
        feed(resumed, NAN)
    resumed.health = health.health
    feed(resumed, 1.0, NAN, NAN)  # no row of three


def test_spikes_that_are_skipped_are_no_measure_and_end_a_run_that_stays_up(tmp_path: Path) -> None:
    health = watch(tmp_path, skip_spikes=True)
    feed(health, *[1.0] * SPIKE_WINDOW)
    assert feed(health, 5.0, 5.0, 1.0) == ["spike", "spike", None]
    assert set(health.health.recent_losses) == {1.0}
    with pytest.raises(UserError, match="3 steps in a row were skipped, more than"):
        feed(health, 5.0, 5.0, 5.0)
