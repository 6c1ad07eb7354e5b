"""A run that goes on is the run that was never stopped: to the bit on as many ranks, to rounding on others."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from audiotext_dist.evaluation import embedded_clips
from audiotext_dist.training.preemption import EXIT_PREEMPTED
from audiotext_dist.training.tracker import METRICS_FILE, read_metrics
from tests.models.hub_models import save_text_model
from tests.ranks import run_on_ranks
from tests.training.runs import Ran, train_many, train_with_faults, write_training_set

NUM_STEPS = 6


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    save_text_model(folder / "roberta", "roberta")
    return write_training_set(folder / "train")


def on_ranks(clips: Path, world_size: int, *parts: tuple[str, int, int]) -> dict[str, Ran]:
    """Runs on so many ranks, each (name, last step, ZeRO stage); what rank 0 saw of each name's last.

    Those named "dropout" have a text tower that drops out.
    """
    tower = str(clips.parent / "roberta")
    dropout = ["model.text.kind=transformers", f"model.text.name={tower}", "model.projection_dim=8"]
    words = [
        (
            [
                f"data.train.own.shards={clips}",
                f"run_dir={clips.parent / name}",
                f"training.max_steps={last_step}",
                f"engine.zero_stage={zero_stage}",
                "training.ema_decay=0.9",
                *(dropout if "dropout" in name else []),
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
        ("dropout", NUM_STEPS, 1),
        ("dropout, resumed", 4, 1),
        ("dropout, resumed", NUM_STEPS, 1),
        ("1-2", NUM_STEPS, 2),
        ("2-1", 4, 1),
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


def test_one_rank_goes_on_where_two_stopped(clips: Path, one_rank: dict[str, Ran], two_ranks: dict[str, Ran]) -> None:
    assert list(two_ranks["2-1"].losses) == [1, 2, 3, 4]
    check_same("2-1", on_ranks(clips, 1, ("2-1", NUM_STEPS, 0))["2-1"], one_rank)


def test_as_many_ranks_go_on_to_the_bit_where_a_tower_drops_out(two_ranks: dict[str, Ran]) -> None:
    stopped, whole = two_ranks["dropout, resumed"], two_ranks["dropout"]
    assert stopped.losses == whole.losses
    # Weights, their averages and optimizer as well.
    assert stopped.states == whole.states[4:]


def evaluations_of_a_stopped_run(rank: int, clips: Path) -> list[list[tuple[float, float]]]:
    """(step, R@1): of a run to step 4, the end of an epoch; of one that goes on from there; and of one that goes on
    but has not evaluated there.
    """
    run_dir, found = clips.parent / "evaluated", []
    words = [f"data.train.own.shards={clips}", f"data.validation.own.shards={clips}", f"run_dir={run_dir}"]
    words += ["evaluation.every_epochs=1", "evaluation.num_examples=0", "checkpoint.keep_last=9"]
    key = "validation/own/audio->text/R@1"
    for last_step in (4, 5, 6):
        if last_step == 6:
            shutil.rmtree(run_dir / "checkpoints" / "step-00000005")
            lines = (run_dir / METRICS_FILE).read_text().splitlines(keepends=True)
            (run_dir / METRICS_FILE).write_text("".join(line for line in lines if key not in line))
        train_with_faults(rank, [*words, f"training.max_steps={last_step}"])
        found.append([(line["trainer/step"], line[key]) for line in read_metrics(run_dir) if key in line])
    return found


def test_an_evaluation_before_which_a_run_was_stopped_is_made_up_for(clips: Path) -> None:
    (found,) = run_on_ranks(evaluations_of_a_stopped_run, 1, clips)
    first, resumed, not_evaluated = found
    assert [[step for step, _ in each] for each in found] == [[4], [4, 5], [4, 6]]
    assert first[0] == resumed[0] == not_evaluated[0]


def stopped_while_it_evaluates(rank: int, clips: Path) -> tuple[int, list[dict[str, float]], list[dict[str, float]]]:
    """Batches of the evaluation until a run was gone, which rank 1 was asked for in its first one; then the metrics of
    the run that goes on, and of one that was never stopped.
    """
    words = [f"data.train.own.shards={clips}", f"data.validation.own.shards={clips}", "evaluation.every_epochs=1"]
    words += ["evaluation.batch_size=5", "evaluation.num_examples=0", "training.max_steps=5", "training.ema_decay=0.9"]
    embed, num_batches = embedded_clips._embed, 0

    def embed_and_ask(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_batches
        num_batches += 1
        if rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return embed(*args, **kwargs)

    stopped, whole = ([*words, f"run_dir={clips.parent / name}"] for name in ("asked", "not asked"))
    with mock.patch.object(embedded_clips, "_embed", embed_and_ask), pytest.raises(SystemExit) as left:
        train_with_faults(rank, stopped)
    assert left.value.code == EXIT_PREEMPTED
    return num_batches, train_with_faults(rank, stopped).metrics, train_with_faults(rank, whole).metrics


@pytest.mark.faults
def test_a_run_that_is_asked_while_it_evaluates_leaves_after_the_batch_and_makes_up_for_it(clips: Path) -> None:
    told = ("train/loss", "validation/own/audio->text/R@1", "validation/own/text->audio/mAP@10")
    for num_batches, resumed, whole in run_on_ranks(stopped_while_it_evaluates, 2, clips):
        assert num_batches == 1
        one, other = (
            [(line["trainer/step"], name, line[name]) for line in lines for name in told if name in line]
            for lines in (resumed, whole)
        )
        assert one == other
        assert [step for step, name, _ in one if name != "train/loss"] == [4, 4, 5, 5]


@pytest.mark.faults
def test_two_then_three_then_one_rank(clips: Path, one_rank: dict[str, Ran]) -> None:
    names = {"2-3-1": 0, "2-3-1 zero 1": 1, "2-3-1 zero 2": 2}
    for world_size, last_step in ((2, 2), (3, 4), (1, NUM_STEPS)):
        found = on_ranks(clips, world_size, *((name, last_step, zero) for name, zero in names.items()))
    for name in names:
        check_same(name, found[name], one_rank)
