"""Our commands, each in a process of its own, for the price of one import: ``python -m tests.commands JSON``.

JSON is a list of [script, words, kill_at]: the process dies of SIGKILL in place of giving its file number kill_at its
name; null lets it live. Prints each exit status on a line of its own.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from audiotext_dist.errors import run_for_people

REPOSITORY = Path(__file__).parents[1]
Command = tuple[str, list[str], int | None]


def run_commands(commands: Sequence[Command], **variables: str) -> tuple[list[int], list[str]]:
    """(exit statuses, negative where a signal killed the process; what each command said), with these variables."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.commands", json.dumps(commands)],
        cwd=REPOSITORY,
        # Passive: threads that wait in turn on a busy machine would double the time.
        env={
            **environment,
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(REPOSITORY),
            "OMP_WAIT_POLICY": "PASSIVE",
            **variables,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    parts = re.split(r"^status (-?\d+)$", done.stdout, flags=re.MULTILINE)
    return [int(status) for status in parts[1::2]], parts[::2][:-1]


def main() -> None:
    """Fork a process a command, one after another."""
    commands: list[Command] = json.loads(sys.argv[1])
    modules = {script: importlib.import_module(f"launch.{script}") for script, _, _ in commands}
    for script, words, kill_at in commands:
        pid = os.fork()
        if pid == 0:
            sys.argv = [f"{script}.py", *words]
            if kill_at is not None:
                die_at_file(kill_at)
            status: object = 1
            try:
                run_for_people(modules[script].main)
                status = 0
            except SystemExit as stop:
                status = stop.code
            finally:
                sys.stdout.flush()
                os._exit(status if isinstance(status, int) else 1)
        _, ended = os.waitpid(pid, 0)
        print(f"\nstatus {os.waitstatus_to_exitcode(ended)}", flush=True)


def die_at_file(number: int) -> None:
    """Be killed when so many files are in their places and the next one is written under its temporary name."""
    replace, count = Path.replace, 0

    def replace_or_die(self: Path, target: Path) -> Path:
        nonlocal count
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        return replace(self, target)

    Path.replace = replace_or_die  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
