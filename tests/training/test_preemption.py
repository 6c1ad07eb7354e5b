"""A run that is asked to go: one checkpoint, nothing left behind, and the resumed run is the one never stopped."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest

from audiotext_dist.training.preemption import EXIT_PREEMPTED
from audiotext_dist.training.tracker import read_metrics
from tests.training.launched import DEEPSPEED, WRAPPER, Launched, launched, wait_for_all
from tests.training.runs import write_training_set

NUM_STEPS = 60


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    clips = write_training_set(tmp_path_factory.mktemp("preemption") / "train")
    common = ["data.num_workers=1", f"training.max_steps={NUM_STEPS}", "training.num_epochs=50", "optim.weight_lr=1e-3"]
    return [f"data.train.own.shards={clips}", *common]


def losses(run_dir: Path) -> dict[float, float]:
    return {line["trainer/step"]: line["train/loss"] for line in read_metrics(run_dir) if "train/loss" in line}


def run_to_the_end(run_dir: Path, words: list[str]) -> dict[float, float]:
    with launched(run_dir, *words) as run:
        assert run.command.wait() == 0, run.said()
    return losses(run_dir)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> dict[float, float]:
    return run_to_the_end(tmp_path_factory.mktemp("whole") / "run", words)


def target(run: Launched, name: str) -> psutil.Process:
    match name:
        case "rank":
            return run.ranks()[1]
        case "launcher":
            return run.launcher()
    return psutil.Process(run.command.pid)


def stop(run_dir: Path, words: list[str], name: str, number: signal.Signals) -> tuple[int, float]:
    """Exit code of the command that was started, and the seconds until nothing of it was left."""
    with launched(run_dir, *words, launcher=WRAPPER if name == "wrapper" else DEEPSPEED) as run:
        run.wait_for_step(5)
        processes = run.processes()
        target(run, name).send_signal(number)
        code = run.command.wait()
        seconds = wait_for_all(processes)
        assert "Traceback" not in run.said(), run.said()
        assert "training.resume=auto goes on" in run.said()
    saved = [path.name for path in (run_dir / "checkpoints").glob("step-*")]
    assert len(saved) == 1, saved
    assert 5 <= int(saved[0].removeprefix("step-")) < NUM_STEPS
    return code, seconds


def test_sigterm_to_the_command_that_passes_signals_on(tmp_path: Path, words: list[str]):
    code, seconds = stop(tmp_path / "run", words, "wrapper", signal.SIGTERM)
    assert code == EXIT_PREEMPTED
    assert seconds < 30


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("name", ["rank", "launcher", "deepspeed", "wrapper"])
def test_a_signal_to_any_process_of_the_run(
    tmp_path: Path, words: list[str], whole: dict[float, float], name: str, number: signal.Signals
):
    code, seconds = stop(tmp_path / "run", words, name, number)
    print(f"{number.name} to the {name}: exit code {code}, nothing left after {seconds:.1f} s")
    assert seconds < 30
    if name in ("rank", "wrapper"):
        assert code == EXIT_PREEMPTED
    assert run_to_the_end(tmp_path / "run", words) == whole
