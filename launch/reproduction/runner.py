"""Runs what a table still lacks: the preparation once, then rows x seeds, several at once where there are devices.

A step leaves a mark, STEP.json, when it begins and another when it has ended; what is marked as ended is not run again,
and a step that was stopped is. So any number of kills is mended by the same command. A step whose command has changed
since is refused: what it left would not be what the table says.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch

from audiotext_dist import storage
from audiotext_dist.errors import UserError
from launch.reproduction.table import Table, resolve

_PR_SET_PDEATHSIG = 1
_LINES_OF_A_FAILURE = 5
Job = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one job runs: GPUs by name, none for the CPU; the threads of each of its processes."""

    gpus: tuple[str, ...]
    num_threads: int

    def launch(self) -> str:
        """What a table's ``${launch}`` stands for."""
        if len(self.gpus) < 2:
            return "python"
        # The launcher takes the GPUs that are visible, unless it is told a number of them.
        return f"deepspeed --log_level warning --master_port {_free_port()}"

    def environment(self) -> dict[str, str]:
        """Of its commands."""
        threads = os.environ.get("OMP_NUM_THREADS", str(self.num_threads))
        device = {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else {"DS_ACCELERATOR": "cpu"}
        return {**os.environ, **device, "OMP_NUM_THREADS": threads, "MASTER_PORT": str(_free_port())}


def places(table: Table) -> list[Place]:
    """One for each job that runs at once.

    Raises:
        UserError: fewer GPUs than a job asks for.
    """
    num_gpus, num_cores = torch.cuda.device_count(), len(os.sched_getaffinity(0))
    if num_gpus == 0:
        num_jobs = table.jobs or 1
        return [Place(gpus=(), num_threads=max(1, num_cores // num_jobs))] * num_jobs
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(gpu) for gpu in range(num_gpus)]
    num_jobs = min(table.jobs or num_gpus, num_gpus // table.gpus_a_job)
    if num_jobs == 0:
        raise UserError(f"gpus_a_job={table.gpus_a_job}, but there are {num_gpus} GPUs: lower it")
    threads = max(1, num_cores // (num_jobs * table.gpus_a_job))
    first = range(0, num_jobs * table.gpus_a_job, table.gpus_a_job)
    return [Place(gpus=tuple(gpus[gpu : gpu + table.gpus_a_job]), num_threads=threads) for gpu in first]


class Runner:
    """One run through a table."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._places = places(table)
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock, self._stopped = threading.Lock(), False

    def run(self) -> dict[str, str]:
        """Everything that is left to do; what failed, by its name, with the reason.

        Raises:
            UserError: a step of the preparation failed.
        """
        table = self._table
        prepared = {**table.variables, "out": table.out}
        with ThreadPoolExecutor(len(self._places)) as pool:
            try:
                for name, command in table.prepare.items():
                    folder = Path(table.out) / "prepare"
                    self._step(folder, name, command, prepared, self._places[0], f"prepare {name}")
                return self._run_jobs(pool)
            finally:
                # Before the pool waits for its threads.
                self._stop()

    def _run_jobs(self, pool: ThreadPoolExecutor) -> dict[str, str]:
        failed: dict[Job, str] = {}
        waiting, free = list(self._table.jobs_in_order()), list(self._places)
        running: dict[Future[None], tuple[Job, Place]] = {}
        while waiting or running:
            job = self._next_ready(waiting, [job for job, _ in running.values()]) if free else None
            if job is not None:
                waiting.remove(job)
                missing = [other for other in self._table.rows[job[0]].after if (other, job[1]) in failed]
                if missing:
                    failed[job] = f"needs {missing[0]}, which failed"
                else:
                    place = free.pop(0)
                    running[pool.submit(self._job, job, place)] = job, place
                continue
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job, place = running.pop(future)
                free.append(place)
                try:
                    future.result()
                except UserError as error:
                    failed[job] = str(error)
                    print(f"failed: {error}", file=sys.stderr, flush=True)
        return {f"{row} seed {seed}": reason for (row, seed), reason in failed.items()}

    def _next_ready(self, waiting: list[Job], running: list[Job]) -> Job | None:
        """The first job in order that waits for no other."""
        unfinished = {*waiting, *running}
        rows = self._table.rows
        return next(
            (job for job in waiting if not any((other, job[1]) in unfinished for other in rows[job[0]].after)), None
        )

    def _job(self, job: Job, place: Place) -> None:
        row, seed = job
        names = self._table.names_of(row, seed)
        for name, command in self._table.steps_of(row).items():
            self._step(self._table.folder(row, seed), name, command, names, place, f"{row} seed {seed} {name}")

    def _step(
        self, folder: Path, name: str, command: str, names: Mapping[str, object], place: Place, where: str
    ) -> None:
        # The mark knows nothing of ports and devices, which change from run to run.
        stated = resolve(command, {**names, "launch": "LAUNCH"}, where)
        mark, log = folder / f"{name}.json", folder / f"{name}.log"
        before = _read_mark(mark)
        if before and shlex.split(str(before["command"])) != shlex.split(stated):
            raise UserError(f"{where} was made by another command: remove {folder}, or give another out=")
        if before and before["ended"]:
            return
        folder.mkdir(parents=True, exist_ok=True)
        _write_mark(mark, stated, ended=False)
        print(f"{time.strftime('%H:%M:%S')} {where}", flush=True)
        start = time.monotonic()
        code = self._call(resolve(command, {**names, "launch": place.launch()}, where), log, place)
        if code != 0:
            said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
            raise UserError(f"{where} ended with {code}, see {log}: {' | '.join(said[-_LINES_OF_A_FAILURE:])[-400:]}")
        _write_mark(mark, stated, ended=True, seconds=round(time.monotonic() - start, 1))

    def _call(self, command: str, log: Path, place: Place) -> int:
        words = shlex.split(command)
        if words[0] in ("python", "deepspeed"):
            # launch.run passes a signal on to the ranks, which deepspeed does not.
            module = [] if words[0] == "python" else ["-m", "launch.run"]
            words = [sys.executable, *module, *words[1:]]
        with log.open("wb") as file, self._lock:
            if self._stopped:
                raise UserError("stopped")
            try:
                process = subprocess.Popen(
                    words,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=place.environment(),
                    start_new_session=True,
                    preexec_fn=_die_with_parent,
                )
            except OSError as error:
                raise UserError(f"cannot run {words[0]} ({error.strerror}): check the table's command") from None
            self._running.add(process)
        code = process.wait()
        with self._lock:
            self._running.discard(process)
        return code

    def _stop(self) -> None:
        """No process is left behind, whatever ended this one."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)


def is_through(table: Table, row: str, seed: int) -> bool:
    """True where every step of a row has ended for a seed."""
    marks = (_read_mark(table.folder(row, seed) / f"{step}.json") for step in table.steps_of(row))
    return all(mark is not None and mark["ended"] for mark in marks)


def _read_mark(path: Path) -> dict[str, object] | None:
    # Half a mark, were there one, would be a step that has not ended.
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return None


def _write_mark(path: Path, command: str, *, ended: bool, seconds: float | None = None) -> None:
    content = {"command": command, "ended": ended, "seconds": seconds}
    storage.write_bytes(str(path), json.dumps(content, indent=1).encode())


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
