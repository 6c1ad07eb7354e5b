"""Metrics files: what a kill leaves behind, and what a resumed run makes of it."""

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from audiotext_dist.training import tracker as tracker_module
from audiotext_dist.training.tracker import METRICS_FILE, Tracker, TrackerConfig, read_metrics
from tests.wandb_file import exit_code


def track(folder, start_step, steps, is_main=True, wandb_id=None):
    tracker = Tracker(
        TrackerConfig(wandb="disabled"),
        folder,
        name="test",
        recipe={},
        start_step=start_step,
        wandb_id=wandb_id,
        is_main=is_main,
    )
    for step in steps:
        tracker.log(step, {"train/loss": step / 2})
    return tracker


def steps_of(folder):
    return [line["trainer/step"] for line in read_metrics(folder)]


def test_each_line_is_on_disk_when_log_returns(tmp_path):
    track(tmp_path, 0, [1, 2])
    assert read_metrics(tmp_path)[-1] == {"trainer/step": 2, "train/loss": 1.0}


def test_a_resumed_run_cuts_the_lines_after_its_checkpoint(tmp_path):
    track(tmp_path, 0, [1, 2, 3, 4]).close()
    track(tmp_path, 2, [3]).close()
    assert steps_of(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("torn", ['{"trainer/st', '{"loss": 1}', "\x00\x00"])
def test_a_line_that_a_kill_left_unfinished_goes(tmp_path, torn):
    track(tmp_path, 0, [1, 2]).close()
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write(torn)
    track(tmp_path, 5, [6]).close()
    assert steps_of(tmp_path) == [1, 2, 6]


def test_a_new_run_starts_with_an_empty_file_and_other_ranks_write_nothing(tmp_path):
    track(tmp_path, 0, [1, 2]).close()
    track(tmp_path, 0, [1]).close()
    assert steps_of(tmp_path) == [1]
    track(tmp_path / "other", 0, [1], is_main=False).close()
    assert not (tmp_path / "other").exists()


OUTLIVING = """
import logging, sys
from pathlib import Path
import psutil
from audiotext_dist.training import tracker as module
from audiotext_dist.training.tracker import Tracker, TrackerConfig
logging.basicConfig(level=logging.INFO)
tracker = Tracker(
    TrackerConfig(), Path("."), name="test", recipe={}, start_step=0, wandb_id=None, is_main=True
)
tracker.log(1, {"train/loss": 1.0})
first_id = tracker.wandb_id
how, end = sys.argv[1:]
for child in psutil.Process().children(recursive=True):
    if "wandb-core" in child.name():
        if how == "killed":
            child.kill()
            child.wait()
        else:
            child.suspend()
for step in (2, 3):
    tracker.log(step, {"train/loss": 1.0})
    print("step", step)
assert tracker.wandb_id == first_id is not None
module.ANSWER_SECONDS, module.LEAVING_SECONDS = (1.0, 1e4) if end == "well" else (1e4, 1.0)
with tracker:
    if end == "failing":
        raise RuntimeError("what went wrong")
    if end == "stopped":
        sys.exit(75)
"""


def run_in(folder: Path, script: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    return subprocess.run(
        [sys.executable, "-c", script, *words],
        cwd=folder,
        env={**environment, "HOME": str(folder), "PYTHONPATH": str(Path(__file__).parents[2])},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.parametrize(
    ("how", "end"), [("killed", "well"), ("hanging", "well"), ("hanging", "failing"), ("hanging", "stopped")]
)
def test_a_run_outlives_the_service_of_wandb(tmp_path, how, end):
    done = run_in(tmp_path, OUTLIVING, how, end)
    # An error of the run is still the one that a person sees, once.
    failed = end == "failing"
    assert done.returncode == {"well": 0, "failing": 1, "stopped": 75}[end], done.stderr
    assert done.stderr.count("Traceback") == int(failed), done.stderr
    assert done.stderr.endswith("\nRuntimeError: what went wrong\n") == failed
    assert steps_of(tmp_path) == [1, 2, 3]
    assert done.stderr.count("W&B has stopped") == 1
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    assert f"wandb sync {folder}\n" in done.stderr


def test_wandb_shows_a_run_that_failed_as_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(tracker_module, "LEAVING_SECONDS", 200.0)
    config = TrackerConfig(wandb="offline")
    with (
        pytest.raises(RuntimeError),
        Tracker(config, tmp_path, name="test", recipe={}, start_step=0, wandb_id=None, is_main=True),
    ):
        raise RuntimeError
    assert exit_code(tmp_path) == 1


PART = """
import logging, os, signal, sys
from pathlib import Path
from audiotext_dist.training.tracker import Tracker, TrackerConfig
logging.basicConfig(level=logging.INFO)
wandb_id, step, end = sys.argv[1:]
with Tracker(
    TrackerConfig(wandb="offline"), Path("."), name="test", recipe={}, start_step=int(step), wandb_id=wandb_id or None,
    is_main=True
) as tracker:
    print(tracker.wandb_id, flush=True)
    tracker.log(int(step) + 1, {"train/loss": 1.0})
    if end == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_an_offline_run_that_goes_on_names_the_folders_of_all_its_parts(tmp_path, caplog):
    other = tmp_path / "wandb" / "offline-run-20200101_000000-other"
    other.mkdir(parents=True)
    killed = run_in(tmp_path, PART, "", "0", "killed")
    wandb_id = killed.stdout.strip()
    assert (killed.returncode, bool(wandb_id)) == (-signal.SIGKILL, True), killed.stderr
    (first,) = tmp_path.glob(f"wandb/offline-run-*-{wandb_id}")
    done = run_in(tmp_path, PART, wandb_id, "1", "well")
    assert (done.returncode, done.stdout.strip()) == (0, wandb_id), done.stderr
    (second,) = set(tmp_path.glob("wandb/offline-run-*")) - {first, other}
    assert f"upload with: wandb sync {first}; wandb sync {second}\n" in done.stderr
    # As `wandb sync` marks a part that it has uploaded.
    (second / f"run-{wandb_id}.wandb.synced").touch()
    caplog.set_level(logging.INFO)
    track(tmp_path, 2, [], wandb_id=wandb_id).close()
    assert caplog.messages == [f"W&B was offline; upload with: wandb sync {first}"]


STARTING = """
from pathlib import Path
from audiotext_dist.training.tracker import Tracker, TrackerConfig
tracker = Tracker(
    TrackerConfig(), Path("."), name="test", recipe={}, start_step=0, wandb_id=None, is_main=True
)
tracker.log(1, {"train/loss": 1.0})
tracker.close()
"""


def test_a_run_starts_where_wandb_cannot(tmp_path):
    (tmp_path / "wandb").touch()  # in the place of its folder: an OSError, as of a full disk
    done = run_in(tmp_path, STARTING)
    assert done.returncode == 0, done.stderr
    assert steps_of(tmp_path) == [1]
    assert done.stderr.count("W&B cannot log") == 1
    assert "Traceback" not in done.stderr
