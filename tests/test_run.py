"""launch/run.py, with stand-ins for DeepSpeed's runner, its launcher and a rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
# The runner starts the launcher by this, and the launcher the rank. As DeepSpeed's do, they pass over a kill.
STARTS = "import subprocess, sys; sys.exit(max(0, subprocess.run([sys.executable, {script!r}]).returncode))"
# Leaves with 75 when it is asked to, if a compiler that it started has not been.
RANK = """
import signal, subprocess, sys
asked = []
signal.signal(signal.SIGUSR1, lambda *_: asked.append(True))
compiler = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
print("ready", flush=True)
while not asked:
    signal.pause()
compiler.communicate()
sys.exit(75 if compiler.returncode == 0 else 1)
"""


# Is asked, and leaves its checkpoint when its launcher is gone.
ORPHAN = """
import os, pathlib, signal, sys, time
asked, launcher = [], os.getppid()
signal.signal(signal.SIGUSR1, lambda *_: asked.append(True))
print("ready", flush=True)
while not asked:
    signal.pause()
print(launcher, flush=True)
while os.getppid() == launcher:
    time.sleep(0.01)
pathlib.Path(__file__).with_name("checkpoint").touch()
"""


# Does not look for its launcher, and hears nothing until that and the runner are gone.
STARTING = """
import os, psutil, signal, time
asked, launcher, runner = [], os.getppid(), psutil.Process().parent().parent().pid
signal.signal(signal.SIGUSR1, lambda *_: asked.append(True))
print("ready", flush=True)
while not asked:
    signal.pause()
print(launcher, flush=True)
while psutil.pid_exists(runner):
    time.sleep(0.01)
asked.clear()
while not asked:
    time.sleep(0.01)
"""


# Leaves as soon as its launcher is gone, before anybody looks.
LEAVING = """
import os, select
launcher = os.pidfd_open(os.getppid())
print("ready", flush=True)
print(os.getppid(), flush=True)
select.select([launcher], [], [])
os._exit(75)
"""


def start(tmp_path: Path, rank: str) -> subprocess.Popen[str]:
    """The command, whose one rank is ready."""
    package = tmp_path / "deepspeed" / "launcher"
    package.mkdir(parents=True)
    (tmp_path / "rank.py").write_text(rank)
    (tmp_path / "launcher.py").write_text(STARTS.format(script=str(tmp_path / "rank.py")))
    (package / "runner.py").write_text(STARTS.format(script=str(tmp_path / "launcher.py")))
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    run = subprocess.Popen(
        [sys.executable, "-m", "launch.run"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "ready\n"
    return run


def test_a_signal_reaches_the_ranks_and_not_what_they_started(tmp_path: Path) -> None:
    run = start(tmp_path, RANK)
    run.send_signal(signal.SIGTERM)
    assert run.wait() == 75


def code_without_a_launcher(tmp_path: Path, rank: str) -> int:
    """What the command says whose launcher is killed outright, once it has passed a signal on."""
    run = start(tmp_path, rank)
    assert run.stdout is not None
    run.send_signal(signal.SIGTERM)
    os.kill(int(run.stdout.readline()), signal.SIGKILL)
    return run.wait()


def test_ranks_whose_launcher_was_killed_write_their_checkpoint_first(tmp_path: Path) -> None:
    assert code_without_a_launcher(tmp_path, ORPHAN) == 75
    assert (tmp_path / "checkpoint").exists()


def test_ranks_that_do_not_look_for_their_launcher_yet_are_told(tmp_path: Path) -> None:
    assert code_without_a_launcher(tmp_path, STARTING) == 75


def test_ranks_that_left_at_once_count_as_well(tmp_path: Path) -> None:
    run = start(tmp_path, LEAVING)
    assert run.stdout is not None
    os.kill(int(run.stdout.readline()), signal.SIGKILL)
    assert run.wait() == 75
