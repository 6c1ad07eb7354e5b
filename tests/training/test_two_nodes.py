"""Two nodes on one machine: over loopback, and in network namespaces of their own, whose link is cut."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from audiotext_dist.training.heartbeat import EXIT_LOST
from audiotext_dist.training.tracker import read_metrics
from tests.ranks import free_port, run_on_ranks
from tests.training.launched import WRAPPER, Launched, launched, wait_for_all
from tests.training.runs import train_with_faults, write_training_set

NUM_STEPS = 6
DEVICE = "node0"
# Enough for ranks that start on a busy machine.
TIMEOUT_SECONDS = 20.0
# Two beats until the silence is sure, the launchers' turns of a second each, and a busy machine.
MARGIN_SECONDS = 15.0


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    clips = write_training_set(tmp_path_factory.mktemp("nodes") / "train")
    return [f"data.train.own.shards={clips}", "optim.weight_lr=1e-3"]


@pytest.fixture(scope="module")
def one_node(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> dict[int, float]:
    """The losses of two ranks on one node."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    return run_on_ranks(train_with_faults, 2, [*words, f"run_dir={run_dir}", f"training.max_steps={NUM_STEPS}"])[
        0
    ].losses


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    """Two network namespaces, 10.77.0.1 and 10.77.0.2, with nothing between them but a virtual cable."""
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("network namespaces need root, and the command ip")
    first, second = (f"audiotext-{os.getpid()}-{node}" for node in "ab")
    try:
        for name in (first, second):
            made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
            if made.returncode:
                pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
        ip("link", "add", DEVICE, "netns", first, "type", "veth", "peer", "name", DEVICE, "netns", second)
        for number, name in enumerate((first, second), start=1):
            ip("-netns", name, "address", "add", f"10.77.0.{number}/24", "dev", DEVICE)
            ip("-netns", name, "link", "set", "lo", "up")
            ip("-netns", name, "link", "set", DEVICE, "up")
        yield first, second
    finally:
        for name in (first, second):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextlib.contextmanager
def two_nodes(run_dir: Path, *words: str, namespaces: Sequence[str] = ()) -> Iterator[tuple[Launched, Launched]]:
    """One run of two nodes, a rank each, over loopback where there are no namespaces."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    hosts = run_dir.parent / "hosts"
    hosts.write_text("node-a slots=1\nnode-b slots=1\n")
    port = str(free_port())
    with contextlib.ExitStack() as stack:
        nodes = [
            stack.enter_context(
                launched(
                    run_dir,
                    *words,
                    launcher=WRAPPER,
                    options=[
                        *["--no_ssh", "--hostfile", str(hosts), "--node_rank", str(number)],
                        *["--master_addr", "10.77.0.1" if namespaces else "127.0.0.1", "--master_port", port],
                    ],
                    inside=["ip", "netns", "exec", namespaces[number]] if namespaces else [],
                    variables={"GLOO_SOCKET_IFNAME": DEVICE} if namespaces else {},
                )
            )
            for number in range(2)
        ]
        yield nodes[0], nodes[1]


def losses_of_two_nodes(run_dir: Path, *words: str, namespaces: Sequence[str] = ()) -> dict[int, float]:
    with two_nodes(run_dir, *words, f"training.max_steps={NUM_STEPS}", namespaces=namespaces) as nodes:
        for node in nodes:
            assert node.command.wait() == 0, node.said()
    return {int(line["trainer/step"]): line["train/loss"] for line in read_metrics(run_dir) if "train/loss" in line}


def test_two_nodes_over_loopback_have_the_losses_of_one(
    tmp_path: Path, words: list[str], one_node: dict[int, float]
) -> None:
    assert list(one_node) == list(range(1, NUM_STEPS + 1))
    assert losses_of_two_nodes(tmp_path / "run", *words) == one_node


@pytest.mark.faults
def test_a_cut_link_ends_both_nodes_and_a_mended_one_carries_a_run(
    tmp_path: Path, words: list[str], one_node: dict[int, float], namespaces: tuple[str, str]
) -> None:
    run_dir = tmp_path / "run"
    endless = ["training.max_steps=100000", "training.num_epochs=100000"]
    cut = [*words, *endless, f"engine.collective_timeout_seconds={TIMEOUT_SECONDS}", "data.num_workers=1"]
    with two_nodes(run_dir, *cut, namespaces=namespaces) as nodes:
        nodes[0].wait_for_step(5)
        processes = [process for node in nodes for process in node.processes()]
        ip("-netns", namespaces[1], "link", "set", DEVICE, "down")
        start = time.monotonic()
        codes = [node.command.wait() for node in nodes]
        wait_for_all(processes)
        seconds = time.monotonic() - start
        said = [[line for line in node.said().splitlines() if line.startswith("error:")] for node in nodes]
        assert not any("Traceback" in node.said() for node in nodes)
    print(f"cut link: nothing left after {seconds:.1f} s, limit {TIMEOUT_SECONDS:g} s; {said}")
    assert codes == [EXIT_LOST, EXIT_LOST]
    assert seconds < TIMEOUT_SECONDS + MARGIN_SECONDS
    assert [len(lines) for lines in said] == [1, 1]
    assert "error: rank 1 gave no sign of life" in said[0][0]
    assert "error: rank 0 " in said[1][0]
    ip("-netns", namespaces[1], "link", "set", DEVICE, "up")
    assert losses_of_two_nodes(tmp_path / "mended", *words, namespaces=namespaces) == one_node
