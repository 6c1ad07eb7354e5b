"""A rank that hangs ends the run on all ranks, by name."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from audiotext_dist.distributed import World
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


def be_suspended(rank: int, port: int, said: Path) -> None:
    os.dup2(os.open(said / f"{rank}", os.O_CREAT | os.O_WRONLY), 2)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    heartbeat = Heartbeat(World(rank=rank, size=2), timeout_seconds=2.0)
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.barrier()
    heartbeat.stop(together=True)


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
