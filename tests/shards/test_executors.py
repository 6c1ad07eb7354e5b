"""A worker that dies or hangs costs one item; nothing outlives the build."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audiotext_dist.errors import UserError
from shards.executors import ITEMS_IN_FLIGHT_PER_WORKER, map_in_order


def square(item: int | str) -> int | str:
    """Even a number's square; a word names what happens to the process."""
    match item:
        case "segmentation fault":
            ctypes.string_at(0)
        case "exit":
            os._exit(0)
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hangs":
            signal.pause()
        case "hangs with the interpreter's lock":
            ctypes.PyDLL(None).pause()
        case "error":
            raise KeyError("named")
        case "process":
            return os.getpid()
        case int():
            return item * item
    return item


DEADLY = ["segmentation fault", "exit", "killed"]
HANGING = ["hangs", "hangs with the interpreter's lock"]


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_lost_worker_costs_its_own_item_and_the_order_stays(num_workers: int) -> None:
    items = [0, *DEADLY, 4, *HANGING, 7, *range(8, 40)]
    found = list(map_in_order(square, items, num_workers, timeout_seconds=1.0))
    assert [item for item, _ in found] == items
    expected = {**dict.fromkeys(DEADLY, "crashed"), **dict.fromkeys(HANGING, "timeout")}
    assert [result for _, result in found] == [expected.get(item) or item * item for item in items]


@settings(max_examples=10, deadline=None)
@given(items=st.lists(st.integers(-9, 9)), num_workers=st.integers(0, 3))
def test_any_number_of_workers_is_the_plain_map(items: list[int], num_workers: int) -> None:
    assert list(map_in_order(square, items, num_workers)) == [(item, item * item) for item in items]


def test_an_error_is_raised_where_the_item_came_from() -> None:
    with pytest.raises(KeyError, match="named"):
        list(map_in_order(square, [1, "error", 2], 2))


def test_only_a_few_results_wait() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        while True:
            taken += 1
            yield taken

    results = map_in_order(square, items(), 2)
    next(results)
    assert taken <= ITEMS_IN_FLIGHT_PER_WORKER * 2
    results.close()


def test_no_process_stays_when_the_results_are_left() -> None:
    results = map_in_order(square, ["process", "process", "hangs", "hangs", "hangs"] + ["process"] * 20, 2)
    pids = {next(results)[1], next(results)[1]}
    results.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def say_in_file_and_hang(path: str) -> None:
    """Say this process's id and stop for good, holding the interpreter's lock."""
    Path(path).write_text(f"{os.getpid()}\n")
    ctypes.PyDLL(None).pause()


def test_a_worker_that_hangs_ends_with_a_build_that_is_killed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "said")
    code = "import sys; from test_executors import *; list(map_in_order(say_in_file_and_hang, sys.argv[1:], 1))"
    build = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "said")],
        env={**os.environ, "PYTHONPATH": ":".join([str(Path(__file__).parent), *sys.path])},
    )
    with (tmp_path / "said").open() as said:  # opens once the worker opens it
        worker = os.pidfd_open(int(said.readline()))
    build.kill()
    build.wait()
    has_ended = bool(select.select([worker], [], [], 20)[0])
    if not has_ended:
        signal.pidfd_send_signal(worker, signal.SIGKILL)
    os.close(worker)
    assert has_ended


def not_loadable() -> Callable[[int], int]:
    raise RuntimeError("no such worker")


class Unloadable:
    """A function that the worker cannot receive, as where its process cannot start."""

    def __call__(self, item: int) -> int:
        return item

    def __reduce__(self) -> tuple[Callable[[], object], tuple[()]]:
        return not_loadable, ()


def test_workers_that_cannot_start_are_no_fault_of_the_item() -> None:
    with pytest.raises(UserError, match="do not start"):
        list(map_in_order(Unloadable(), [1], 1))


@pytest.mark.filterwarnings("ignore")
def test_ray_gives_what_the_local_pool_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="Ray is an optional extra")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        assert list(map_in_order(abs, range(-40, 0), 2, executor="ray")) == [(-n, n) for n in range(40, 0, -1)]
        assert list(map_in_order(os._exit, [0, 1], 1, executor="ray")) == [(0, "crashed"), (1, "crashed")]
        slept = map_in_order(time.sleep, [0, 1000, 0], 1, timeout_seconds=1.0, executor="ray")
        assert list(slept) == [(0, None), (1000, "timeout"), (0, None)]
    finally:
        ray.shutdown()


@pytest.mark.faults
@pytest.mark.filterwarnings("ignore")
def test_a_lost_machine_of_a_ray_cluster_costs_no_item(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="Ray is an optional extra")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    lost = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        cluster.wait_for_nodes()
        results = map_in_order(abs, range(-200, 0), 2, executor="ray")
        found = [next(results) for _ in range(20)]
        cluster.remove_node(lost)
        # One more machine joins, as a cluster replaces one: the lost actor starts there.
        cluster.add_node(num_cpus=1)
        found += results
        assert found == [(-n, n) for n in range(200, 0, -1)]
    finally:
        ray.shutdown()
        cluster.shutdown()
