"""launch/run.py, with stand-ins for DeepSpeed's runner, its launcher and a rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
# The runner starts the launcher by this, and the launcher the rank.
STARTS = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, {script!r}]).returncode)"
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


def test_a_signal_reaches_the_ranks_and_not_what_they_started(tmp_path: Path) -> None:
    package = tmp_path / "deepspeed" / "launcher"
    package.mkdir(parents=True)
    (tmp_path / "rank.py").write_text(RANK)
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
    run.send_signal(signal.SIGTERM)
    assert run.wait() == 75
