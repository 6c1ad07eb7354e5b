"""A paper's table, every row and seed: ``python launch/reproduce.py launch/tables/NAME.yaml [key=value ...]``."""

from __future__ import annotations

import inspect
import signal
import sys
from pathlib import Path
from types import FrameType

from audiotext_dist import configuration
from audiotext_dist.errors import UserError, run_for_people
from launch.reproduction import table as table_file
from launch.reproduction.runner import Runner
from launch.reproduction.summary import summarise, write_summary
from launch.reproduction.table import Table, read_table

HELP = """Run what a table still lacks, then print and write it into its folder: table.md, table.json and table.png, or
whatever name= says in the place of "table".

    python launch/reproduce.py launch/tables/temporal_agreement_soundscape.yaml
    python launch/reproduce.py TABLE.yaml seeds=[0] only=[conventional,nearest_n15]       (a part of it)
    python launch/reproduce.py TABLE.yaml jobs=2            (rows at once; on GPUs by default one each)
    python launch/reproduce.py TABLE.yaml gpus_a_job=4      (each row on four GPUs)
    python launch/reproduce.py TABLE.yaml show=true         (run nothing, show what is there)
    python launch/reproduce.py TABLE.yaml variables.num_train=512 out=runs/small

The same command goes on after a stop of any kind: steps that have ended are not run again. A row that fails is named,
with the last lines of its log, and the others go on; the exit code is then 1. Every command's output is in
OUT/ROW/seed-N/STEP.log.

"""


def main() -> None:
    """Read the table, run it, write it."""
    words = sys.argv[1:]
    if not words or {"-h", "--help"} & set(words):
        print(f"{HELP}{_file_format()}\n\nKeys:\n{configuration.describe(Table)}")
        return
    if "=" in words[0]:
        raise UserError(f"give the table's file first, not {words[0]}")
    shown = [word for word in words if word.startswith("show=")]
    table = read_table(words[0], [word for word in words[1:] if word not in shown])
    failed: dict[str, str] = {}
    if shown != ["show=true"]:
        signal.signal(signal.SIGTERM, _stop)
        failed = Runner(table).run()
    print(f"\n{write_summary(table, summarise(table), failed)}")
    print(f"\nalso {Path(table.out) / table.name}.md, .json and .png")
    for name, reason in failed.items():
        print(f"failed: {name}: {reason}")
    if failed:
        sys.exit(1)


def _file_format() -> str:
    return inspect.cleandoc(table_file.__doc__ or "")


def _stop(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    run_for_people(main)
