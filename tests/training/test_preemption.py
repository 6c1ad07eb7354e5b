"""A run that is asked to go: one checkpoint, nothing left behind, and the resumed run is the one never stopped."""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import psutil
import pytest

from audiotext_dist.training import checkpoint
from audiotext_dist.training.preemption import EXIT_PREEMPTED, WRAPPER_VARIABLE
from audiotext_dist.training.tracker import read_metrics
from tests.ranks import run_on_ranks
from tests.training.launched import DEEPSPEED, WRAPPER, Launched, launched, wait_for_all
from tests.training.runs import train_with_faults, write_training_set

NUM_STEPS = 60
LIMIT_SECONDS = 30
# Of the command that was started; a negative one is the signal that it died of. docs/clusters.md promises them.
EXIT_CODES = {
    ("rank", signal.SIGTERM): EXIT_PREEMPTED,
    ("rank", signal.SIGUSR1): EXIT_PREEMPTED,
    ("wrapper", signal.SIGTERM): EXIT_PREEMPTED,
    ("wrapper", signal.SIGUSR1): EXIT_PREEMPTED,
    ("launcher", signal.SIGTERM): 1,
    ("launcher", signal.SIGUSR1): 0,  # the command takes a launcher that died of a signal for one that ended well
    ("deepspeed", signal.SIGTERM): -signal.SIGTERM,
    ("deepspeed", signal.SIGUSR1): -signal.SIGUSR1,
}


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
    """Exit code of the command that was started, and the seconds from the signal until nothing of it was left."""
    with launched(run_dir, *words, launcher=WRAPPER if name == "wrapper" else DEEPSPEED) as run:
        run.wait_for_step(5)
        processes = run.processes()
        asked = target(run, name)
        start = time.monotonic()
        asked.send_signal(number)
        code = run.command.wait()
        wait_for_all(processes)
        seconds = time.monotonic() - start
        assert "Traceback" not in run.said(), run.said()
        saved = [path.name for path in (run_dir / "checkpoints").glob("step-*")]
        assert len(saved) == 1, saved
        assert f"training.resume=auto goes on from {saved[0]}" in run.said()
    assert 5 <= int(saved[0].removeprefix("step-")) < NUM_STEPS
    return code, seconds


def test_sigterm_to_the_command_that_passes_signals_on(tmp_path: Path, words: list[str]):
    code, seconds = stop(tmp_path / "run", words, "wrapper", signal.SIGTERM)
    assert code == EXIT_PREEMPTED
    assert seconds < LIMIT_SECONDS


@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "number"),
    [("launcher", signal.SIGKILL), ("deepspeed", signal.SIGTERM), ("wrapper", signal.SIGKILL)],
)
def test_ranks_that_still_start_end_with_their_launcher(
    tmp_path: Path, words: list[str], name: str, number: signal.Signals
):
    with launched(tmp_path / "run", *words, launcher=WRAPPER if name == "wrapper" else DEEPSPEED) as run:
        run.wait_for_watching_ranks()
        processes = run.processes()
        start = time.monotonic()
        target(run, name).send_signal(number)
        wait_for_all(processes)
        print(f"{number.name} to the {name} at the start: nothing left {time.monotonic() - start:.1f} s after it")
        assert "this rank ends, since its launcher has; there was nothing to save" in run.said()
    assert not (tmp_path / "run" / "checkpoints").exists()


# A rank: names its launcher, and what it is asked once that is gone.
RANK = """
import os, sys, time
from audiotext_dist.training.preemption import StopRequest
stop = StopRequest()
if sys.argv[1] == "listening":
    stop.listen()
print(os.getppid(), flush=True)
until = time.monotonic() + 60
while not stop.is_made() and time.monotonic() < until:
    time.sleep(0.01)
print(stop.reason, flush=True)
os._exit(0)
"""


@pytest.mark.parametrize(
    ("state", "last_line"),
    [
        ("starting", "error: this rank ends, since its launcher has; there was nothing to save"),
        ("listening", "the launcher's end"),
    ],
)
def test_a_rank_notices_its_launchers_end(state: str, last_line: str):
    start = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"
    launcher = subprocess.Popen(
        [sys.executable, "-c", start, RANK, state],
        env={**os.environ, "LOCAL_RANK": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert launcher.stdout is not None
    assert int(launcher.stdout.readline()) == launcher.pid
    launcher.kill()
    launcher.wait()
    assert launcher.stdout.read().strip() == last_line, "the stream ends with the rank"


def test_a_rank_whose_wrapper_died_before_it_started_ends():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    variables = {"LOCAL_RANK": "0", WRAPPER_VARIABLE: f"{socket.gethostname()}:{gone.pid}"}
    rank = subprocess.run([sys.executable, "-c", RANK, "starting"], env={**os.environ, **variables}, timeout=60)
    assert rank.returncode == EXIT_PREEMPTED


def last_words_on_a_full_disk(rank: int, run_dir: Path, words: list[str]) -> list[str]:
    """Of two runs that are stopped when the disk is full, to the first checkpoint and to the second."""
    said: list[str] = []
    logging.getLogger("audiotext_dist.training.loop").addFilter(lambda line: bool(said.append(line.getMessage())))
    save_file = checkpoint.save_file
    for full_at in (1, 2):

        def save(tensors: dict[str, object], file: Path, full_at: int = full_at) -> None:
            if file.parent.name == f".step-0000000{full_at}.partial":
                os.kill(os.getpid(), signal.SIGUSR1)
                raise OSError(errno.ENOSPC, "No space left on device")
            save_file(tensors, file)

        with mock.patch.object(checkpoint, "save_file", save), pytest.raises(SystemExit) as left:
            train_with_faults(rank, [*words, f"run_dir={run_dir / str(full_at)}", "checkpoint.every_steps=1"])
        said.append(f"code {left.value.code}")
    return [line for line in said if line.startswith(("stopped", "code"))]


@pytest.mark.faults
def test_the_last_line_names_the_checkpoint_that_stands(tmp_path: Path, words: list[str]) -> None:
    first, _, second, _ = said = run_on_ranks(last_words_on_a_full_disk, 1, tmp_path, words)[0]
    assert said[1::2] == [f"code {EXIT_PREEMPTED}"] * 2
    assert first.startswith("stopped by SIGUSR1 after step 1 of 60; there is no checkpoint: ")
    assert second == "stopped by SIGUSR1 after step 2 of 60; training.resume=auto goes on from step-00000001"


@pytest.mark.faults
@pytest.mark.parametrize(("name", "number"), EXIT_CODES)
def test_a_signal_to_any_process_of_the_run(
    tmp_path: Path, words: list[str], whole: dict[float, float], name: str, number: signal.Signals
):
    code, seconds = stop(tmp_path / "run", words, name, number)
    print(f"{number.name} to the {name}: exit code {code}, nothing left {seconds:.1f} s after the signal")
    assert seconds < LIMIT_SECONDS
    assert code == EXIT_CODES[name, number]
    assert run_to_the_end(tmp_path / "run", words) == whole
