"""A run that goes on is the run that was never stopped: to the bit on as many ranks, to rounding on others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import run_on_ranks
from tests.training.runs import Ran, train_many, write_training_set

NUM_STEPS = 6


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_training_set(tmp_path_factory.mktemp("resume") / "train")


def on_ranks(clips: Path, world_size: int, *parts: tuple[str, int, int]) -> dict[str, Ran]:
    """Runs on so many ranks, each (name, last step, ZeRO stage); what rank 0 saw of each name's last."""
    words = [
        (
            [
                f"data.train.own.shards={clips}",
                f"run_dir={clips.parent / name}",
                f"training.max_steps={last_step}",
                f"engine.zero_stage={zero_stage}",
                "training.ema_decay=0.9",
            ],
            [],
        )
        for name, last_step, zero_stage in parts
    ]
    ran = run_on_ranks(train_many, world_size, words)[0]
    return {name: each for (name, _, _), each in zip(parts, ran, strict=True)}


@pytest.fixture(scope="module")
def one_rank(clips: Path) -> dict[str, Ran]:
    return on_ranks(clips, 1, ("whole", NUM_STEPS, 0), ("1-2", 4, 0))


@pytest.fixture(scope="module")
def two_ranks(clips: Path, one_rank: dict[str, Ran]) -> dict[str, Ran]:
    return on_ranks(
        clips,
        2,
        ("2 zero 1", NUM_STEPS, 1),
        ("2 and 2 zero 1", 4, 1),
        ("2 and 2 zero 1", NUM_STEPS, 1),
        ("1-2", NUM_STEPS, 2),
    )


def check_same(name: str, ran: Ran, one_rank: dict[str, Ran]) -> None:
    whole = one_rank["whole"].losses
    assert list(whole) == list(range(1, NUM_STEPS + 1))
    print(name, "differs by", max(abs(ran.losses[step] / loss - 1) for step, loss in whole.items()))
    assert ran.losses == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("name", ["2 zero 1", "1-2"])
def test_two_ranks_and_zero_1_have_the_losses_of_one(
    one_rank: dict[str, Ran], two_ranks: dict[str, Ran], name: str
) -> None:
    check_same(name, two_ranks[name], one_rank)


def test_as_many_ranks_go_on_to_the_bit(two_ranks: dict[str, Ran]) -> None:
    stopped, whole = two_ranks["2 and 2 zero 1"], two_ranks["2 zero 1"]
    assert stopped.losses == whole.losses
    # Weights, their averages and optimizer as well.
    assert stopped.states == whole.states[4:]


@pytest.mark.faults
def test_two_then_three_then_one_rank(clips: Path, one_rank: dict[str, Ran]) -> None:
    names = {"2-3-1": 0, "2-3-1 zero 1": 1, "2-3-1 zero 2": 2}
    for world_size, last_step in ((2, 2), (3, 4), (1, NUM_STEPS)):
        found = on_ranks(clips, world_size, *((name, last_step, zero) for name, zero in names.items()))
    for name in names:
        check_same(name, found[name], one_rank)
