"""A run that goes on is the run that was never stopped: to the bit on as many ranks, to rounding on others."""

from __future__ import annotations

import pytest

from tests.ranks import run_on_ranks
from tests.training.runs import Ran, train_many, write_training_set

NUM_STEPS = 9


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    """What rank 0 saw of each run; ``2-3-1`` began on 2 ranks, went on on 3, and ended on 1, three steps each."""
    folder = tmp_path_factory.mktemp("resume")
    clips = write_training_set(folder / "train")
    found: dict[str, Ran] = {}

    def on_ranks(world_size: int, *parts: tuple[str, int, int]) -> None:
        words = [
            (
                [
                    f"data.train.own.shards={clips}",
                    f"run_dir={folder / name}",
                    f"training.max_steps={last_step}",
                    f"engine.zero_stage={zero_stage}",
                ],
                [],
            )
            for name, last_step, zero_stage in parts
        ]
        ran = run_on_ranks(train_many, world_size, words)[0]
        found.update({name: each for (name, _, _), each in zip(parts, ran, strict=True)})

    on_ranks(1, ("whole", NUM_STEPS, 0), ("1-2", 4, 0))
    on_ranks(
        2,
        ("2-3-1", 3, 0),
        ("2-3-1 zero 1", 3, 1),
        ("2 zero 1", NUM_STEPS, 1),
        ("2 and 2 zero 1", 4, 1),
        ("2 and 2 zero 1", NUM_STEPS, 1),
        ("2", NUM_STEPS, 0),
        ("2 and 2", 4, 0),
        ("2 and 2", NUM_STEPS, 0),
        ("1-2", NUM_STEPS, 1),
    )
    on_ranks(3, ("2-3-1", 6, 0), ("2-3-1 zero 1", 6, 1))
    on_ranks(1, ("2-3-1", NUM_STEPS, 0), ("2-3-1 zero 1", NUM_STEPS, 1))
    return found


@pytest.mark.parametrize("name", ["2", "2 zero 1", "1-2", "2-3-1", "2-3-1 zero 1"])
def test_any_number_of_ranks_and_zero_stage_goes_on_with_the_same_losses(runs: dict[str, Ran], name: str) -> None:
    whole = runs["whole"].losses
    assert list(whole) == list(range(1, NUM_STEPS + 1))
    assert runs[name].losses == pytest.approx(whole, rel=1e-5)
    print(name, max(abs(runs[name].losses[step] / loss - 1) for step, loss in whole.items()))


@pytest.mark.parametrize("zero", ["", " zero 1"])
def test_as_many_ranks_go_on_to_the_bit(runs: dict[str, Ran], zero: str) -> None:
    assert runs[f"2 and 2{zero}"].losses == runs[f"2{zero}"].losses
    # Weights and optimizer as well.
    assert runs[f"2 and 2{zero}"].states == runs[f"2{zero}"].states[4:]
