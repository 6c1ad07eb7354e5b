"""A rank that hangs ends the run on all ranks, by name."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from audiotext_dist.distributed import World
from audiotext_dist.training import heartbeat
from audiotext_dist.training.heartbeat import EXIT_LOST, Heartbeat
from tests.ranks import PROCESSES, free_port
from tests.training.launched import launched, wait_for_all
from tests.training.runs import write_training_set


def wait_in_a_collective(rank: int, port: int, stopped: int, said: Path) -> None:
    os.dup2(os.open(said / f"{rank}", os.O_CREAT | os.O_WRONLY), 2)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    Heartbeat(World(rank=rank, size=2), timeout_seconds=2.0)
    # Longer than the limit: ranks that are alive are left alone.
    time.sleep(3)
    dist.barrier()
    if rank == stopped:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.all_reduce(torch.ones(1))


@pytest.mark.parametrize("stopped", [0, pytest.param(1, marks=pytest.mark.faults)])
def test_a_stopped_rank_is_named_by_the_other(tmp_path: Path, stopped: int) -> None:
    port = free_port()
    ranks = [PROCESSES.Process(target=wait_in_a_collective, args=(rank, port, stopped, tmp_path)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    other = 1 - stopped
    ranks[other].join()
    assert ranks[other].exitcode == EXIT_LOST
    ranks[stopped].kill()
    ranks[stopped].join()
    said = (tmp_path / str(other)).read_text()
    assert said.count("error:") == 1
    assert f"error: rank {stopped} " in said
    assert "Traceback" not in said


class CountingStore:
    """A store in this process, which counts what is asked of it until a rank has beaten twice."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.has_beaten_twice = threading.Event()
        self._store = dist.HashStore()

    def clone(self) -> CountingStore:
        return self

    def __getattr__(self, name: str) -> object:
        def ask(*words: object) -> object:
            if not self.has_beaten_twice.is_set():
                self.requests.append(name)
            if words[-1] == "2":
                self.has_beaten_twice.set()
            return getattr(self._store, name)(*words)

        return ask


def test_a_beat_costs_two_requests_however_many_ranks_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    store = CountingStore()
    for rank in range(100):
        store._store.set(f"heartbeat/{rank}", "0")
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(heartbeat, "is_parallel", lambda: True)
    beating = Heartbeat(World(rank=1, size=100), timeout_seconds=5.0)
    assert store.has_beaten_twice.wait(60)
    beating.stop(together=False)
    assert store.requests == ["set", "set", "multi_get", "set"]


def be_suspended(rank: int, port: int, said: Path) -> None:
    os.dup2(os.open(said / f"{rank}", os.O_CREAT | os.O_WRONLY), 2)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    beating = Heartbeat(World(rank=rank, size=2), timeout_seconds=2.0)
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.barrier()
    beating.stop(together=True)


@pytest.mark.faults
def test_a_job_that_was_suspended_as_a_whole_goes_on(tmp_path: Path) -> None:
    port = free_port()
    ranks = [PROCESSES.Process(target=be_suspended, args=(rank, port, tmp_path)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    first, second = (psutil.Process(rank.pid) for rank in ranks)
    while second.status() != psutil.STATUS_STOPPED:
        time.sleep(0.02)
    first.suspend()
    time.sleep(3)  # longer than the limit
    first.resume()
    time.sleep(0.5)  # it beats, the other does not yet
    second.resume()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0], (tmp_path / "0").read_text()


@pytest.mark.faults
@pytest.mark.parametrize("fault", [signal.SIGSTOP, signal.SIGKILL])
@pytest.mark.parametrize("number", [0, 1])
def test_nothing_of_a_run_outlives_a_rank_that_hangs_or_dies(
    tmp_path: Path, fault: signal.Signals, number: int
) -> None:
    clips = write_training_set(tmp_path / "train")
    words = [f"data.train.own.shards={clips}", "data.num_workers=1", "training.num_epochs=10000"]
    # Enough for ranks that start on a busy machine.
    with launched(tmp_path / "run", *words, "engine.collective_timeout_seconds=20") as run:
        run.wait_for_step(5)
        processes = run.processes()
        run.ranks()[number].send_signal(fault)
        start = time.monotonic()
        # First, since whoever else waits for it takes its exit code away.
        code = run.command.wait()
        wait_for_all(processes)
        seconds = time.monotonic() - start
        print(f"{fault.name} to rank {number}: nothing left after {seconds:.1f} s")
        # The limit, the launcher's 30 s for a process that is stopped, and the turns of a busy machine.
        assert seconds < 20 + 30 + 45
        assert code != 0
        said = [line for line in run.said().splitlines() if line.startswith("error:")]
        assert len(said) == 1, run.said()
        assert "Traceback" not in run.said(), run.said()
        if fault == signal.SIGSTOP:
            assert f"error: rank {number} " in said[0]
