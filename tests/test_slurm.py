"""launch/slurm/pretrain.sbatch, with stand-ins for Slurm's commands and for python."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "launch/slurm/pretrain.sbatch"
STAND_INS = {
    # As many tasks as nodes; the highest exit code is srun's.
    "srun": """while [[ $1 == --* ]]; do echo "$1" >> options; shift; done
for node in $NODES; do SLURM_NODEID=$((${node#n} - 1)) "$@" & tasks+=($!); done
code=0
for task in "${tasks[@]}"; do wait "$task"; ended=$?; ((ended > code)) && code=$ended; done
exit $code""",
    # Leaves with the node's code: at once, or at the signal where it waits for one.
    "python": """code=$(cut -d' ' -f$((SLURM_NODEID + 1)) <<< "$CODES")
trap 'exit $code' USR1
cat "$5" > "hosts-$SLURM_NODEID"
echo "$OMP_NUM_THREADS $INSIDE $*" > "words-$SLURM_NODEID"
echo $$ $PPID > "task-$SLURM_NODEID"
[ -z "$WAITS" ] && exit $code
echo ready > ready
for _ in {1..1000}; do sleep 0.01; done""",
    "scancel": """kill -USR1 $(cat task-*)""",
    "squeue": 'echo "$STATE"',
    "scontrol": """if [ "$1" = show ]; then printf '%s\\n' $NODES; else echo "$*" > requeued; fi""",
}


def start(
    folder: Path, words: Sequence[str], codes: str, *, waits: bool = False, **variables: str
) -> subprocess.Popen[str]:
    """The script in a job of two nodes, whose launch.run end with these codes."""
    commands = folder / "commands"
    commands.mkdir()
    for name, body in STAND_INS.items():
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(0o755)
    os.mkfifo(folder / "ready")
    job = {
        "PATH": f"{commands}:{os.environ['PATH']}",
        **{"NODES": "n1 n2", "CODES": codes, "STATE": "RUNNING", "WAITS": "yes" if waits else "", "INSIDE": "-"},
        **{"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_SUBMIT_DIR": str(folder)},
        **{"SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "10"},
    }
    return subprocess.Popen(
        ["bash", SCRIPT, *words], cwd=folder, env=job | variables, stderr=subprocess.PIPE, text=True
    )


def test_each_node_has_the_command_of_its_own(tmp_path: Path) -> None:
    job = start(tmp_path, ["recipe=R.yaml", "data.train={a: b}"], "0 0", CONTAINER="env INSIDE=container")
    assert job.wait() == 0
    for node in range(2):
        assert (tmp_path / f"hosts-{node}").read_text() == "n1 slots=4\nn2 slots=4\n"
        assert (tmp_path / f"words-{node}").read_text() == (
            f"3 container -m launch.run --no_ssh --hostfile {tmp_path}/.hosts-12345 --node_rank {node} "
            "--master_addr n1 --master_port 22345 --log_level warning "
            "launch/pretrain.py recipe=R.yaml data.train={a: b} training.resume=auto\n"
        )
    assert "--cpus-per-task=10" in (tmp_path / "options").read_text()
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize(
    ("codes", "state", "restarts", "again"),
    [
        ("75 75", "RUNNING", "20", True),
        ("75 75", "COMPLETING", "0", False),  # by scancel
        ("69 69", "RUNNING", "0", True),
        ("69 69", "RUNNING", "5", False),
        ("69 247", "RUNNING", "0", False),
        ("69 1", "RUNNING", "0", False),  # the other node's error is why this one ended
        ("2 69", "RUNNING", "0", False),
        ("2 2", "RUNNING", "0", False),
    ],
)
def test_a_job_is_queued_again_where_that_helps(
    tmp_path: Path, codes: str, state: str, restarts: str, again: bool
) -> None:
    job = start(tmp_path, [], codes, STATE=state, SLURM_RESTART_COUNT=restarts)
    assert job.wait() == max(int(code) for code in codes.split())
    assert (tmp_path / "requeued").exists() == again
    assert not list(tmp_path.glob(".hosts-12345*"))


def test_codes_of_a_start_whose_shell_was_killed_are_not_this_ones(tmp_path: Path) -> None:
    (tmp_path / ".hosts-12345.code-1").write_text("1\n")
    job = start(tmp_path, [], "69", NODES="n1")  # so the second node notes no code of its own
    assert job.wait() == 69
    assert (tmp_path / "requeued").exists()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_the_script_reaches_every_node(tmp_path: Path, number: signal.Signals) -> None:
    job = start(tmp_path, [], "75 75", waits=True)
    with os.fdopen(os.open(tmp_path / "ready", os.O_RDWR)) as pipe:
        assert [pipe.readline() for _ in range(2)] == ["ready\n"] * 2
    job.send_signal(number)
    assert job.wait() == 75
    assert (tmp_path / "requeued").read_text() == "requeue 12345\n"
