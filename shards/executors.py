"""Where the work of a build runs: worker processes on this machine, or on the machines of a Ray cluster.

1. Each worker is one process behind two pipes, so the build knows which item each of them holds; the next item
   already lies in its pipe when it has done one.
2. A worker that dies or takes too long is killed and replaced; the item that it was at, and no other, is lost.
3. Results come back in the order of the items, and only a few wait at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any, Generic, Literal, TypeVar

from audiotext_dist.errors import UserError
from audiotext_dist.memory import keep_freed_memory

Item = TypeVar("Item")
Result = TypeVar("Result")
Lost = Literal["crashed", "timeout"]
Executor = Literal["local", "ray"]

ITEMS_IN_FLIGHT_PER_WORKER = 4
# A worker that has its result taken in one piece goes on at once.
PIPE_BYTES = 1 << 20
# An item may be sent to a worker that is at another one if a pipe of any size holds it: nobody waits for its reading.
MAX_BYTES_AHEAD = 4096
# Imported once, by the process that workers are forked from: a worker starts in milliseconds.
PRELOADED = ["shards.job"]


@dataclass(kw_only=True)
class Task(Generic[Item, Result]):
    """An item on its way: pickled for its worker, then with its result."""

    item: Item
    pickled: bytes
    is_done: bool = False
    result: Result | Lost | None = None


class Worker(Generic[Item, Result]):
    """A process that applies one function to one item after another; it starts with the first item."""

    def __init__(self, function: Callable[[Item], Result], timeout_seconds: float | None) -> None:
        self._function = function
        self._timeout_seconds = math.inf if timeout_seconds is None else timeout_seconds
        self._process: Any = None
        self._tasks: deque[Task[Item, Result]] = deque()  # the process is at the first, or has done it
        self._items: Connection
        self.results: Connection

    @property
    def is_busy(self) -> bool:
        """True while it holds a task."""
        return bool(self._tasks)

    def takes(self, task: Task[Item, Result]) -> bool:
        """True if the task may be given now: the worker is free, or at its last task and this one is small."""
        return not self._tasks or (len(self._tasks) == 1 and len(task.pickled) <= MAX_BYTES_AHEAD)

    def give(self, task: Task[Item, Result]) -> None:
        """Have a task done.

        Raises:
            UserError: no process can be started.
        """
        if self._process is None:
            self._start()
        if not self._tasks:
            self._began = time.monotonic()
        self._tasks.append(task)
        with contextlib.suppress(ConnectionError):  # of a process that is dead, as ``finish_task`` will see
            self._items.send_bytes(task.pickled)

    def seconds_left(self) -> float:
        """How long it may still be at its first task."""
        return max(0.0, self._began + self._timeout_seconds - time.monotonic())

    def finish_task(self, has_answered: bool) -> None:
        """Take the first task's result, or note how the process was lost over it; then another goes on.

        Args:
            has_answered: False where its time is over.

        Raises:
            UserError: no other process can be started.
            Exception: what the function raised.
        """
        lost: Lost | None = None if has_answered else "timeout"
        result: Result | None = None
        if has_answered:
            try:
                result, error = self.results.recv()
            except (EOFError, ConnectionError):
                lost, error = "crashed", None
            if error is not None:
                raise error
        task = self._tasks.popleft()
        task.is_done, task.result = True, lost or result
        self._began = time.monotonic()
        if lost:
            self.end()
            left, self._tasks = self._tasks, deque()
            for task in left:
                self.give(task)

    def call(self, item: Item) -> Result | Lost:
        """``function(item)``, or how the process was lost over it."""
        task = Task[Item, Result](item=item, pickled=bytes(ForkingPickler.dumps(item)))
        self.give(task)
        self.finish_task(bool(answered([self])))
        return task.result  # type: ignore[return-value]

    def end(self) -> None:
        """End the process, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._items.close()
            self.results.close()
            self._process = None

    def _start(self) -> None:
        # Not fork: the build has threads, and its decoders may too.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        its_items, self._items = context.Pipe(duplex=False)
        self.results, its_results = context.Pipe(duplex=False)
        with contextlib.suppress(PermissionError):  # above the system's limit
            fcntl.fcntl(its_results.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._process = context.Process(target=_serve, args=(self._function, its_items, its_results), daemon=True)
        self._process.start()
        its_items.close()
        its_results.close()
        try:
            self.results.recv()
        except (EOFError, ConnectionError):
            self.end()
            raise UserError("worker processes do not start (out of memory?): give fewer num_workers") from None


def answered(workers: Sequence[Worker[Item, Result]]) -> list[Any]:
    """The results that can be taken, once there is one, or none where the time of a worker is over."""
    seconds = min(worker.seconds_left() for worker in workers)
    return wait([worker.results for worker in workers], None if math.isinf(seconds) else seconds)


def map_in_order(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    num_workers: int,
    timeout_seconds: float | None = None,
    executor: Executor = "local",
) -> Generator[tuple[Item, Result | Lost], None, None]:
    """Each item with ``function(item)``, or with how its worker was lost, in the order of the items.

    Args:
        num_workers: processes, of this machine or of the Ray cluster; 0 works in this process, unprotected.
        timeout_seconds: the longest an item may take; None sets no limit.

    Raises:
        UserError: no worker can be started, or Ray is not installed or lost.
        Exception: what the function raised.
    """
    if num_workers == 0:
        yield from ((item, function(item)) for item in items)
    elif executor == "ray":
        yield from _on_ray(function, items, num_workers, timeout_seconds)
    else:
        workers = [Worker(function, timeout_seconds) for _ in range(num_workers)]
        try:
            yield from _on_this_machine(workers, items)
        finally:
            for worker in workers:
                worker.end()


def _on_this_machine(
    workers: list[Worker[Item, Result]], items: Iterable[Item]
) -> Generator[tuple[Item, Result | Lost], None, None]:
    tasks = (Task[Item, Result](item=item, pickled=bytes(ForkingPickler.dumps(item))) for item in items)
    next_task = next(tasks, None)
    in_order: deque[Task[Item, Result]] = deque()
    while in_order or next_task is not None:
        # The free ones first.
        for worker in sorted(workers, key=lambda worker: worker.is_busy):
            may_wait = len(in_order) < ITEMS_IN_FLIGHT_PER_WORKER * len(workers)
            if next_task is not None and may_wait and worker.takes(next_task):
                worker.give(next_task)
                in_order.append(next_task)
                next_task = next(tasks, None)
        if in_order[0].is_done:
            done = in_order.popleft()
            yield done.item, done.result  # type: ignore[misc]
            continue
        busy = [worker for worker in workers if worker.is_busy]
        ready = answered(busy)
        for worker in busy:
            if worker.results in ready or not worker.seconds_left():
                worker.finish_task(worker.results in ready)


def _on_ray(
    function: Callable[[Item], Result], items: Iterable[Item], num_workers: int, timeout_seconds: float | None
) -> Generator[tuple[Item, Result | Lost], None, None]:
    try:
        import ray
        from ray.util import ActorPool
    except ImportError:
        raise UserError("executor=ray needs Ray: pip install 'audiotext-dist[ray]', or give executor=local") from None
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    # A lost machine is no fault of the item: Ray starts the actor elsewhere and calls again.
    remote_worker = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=-1)(Worker)
    actors: list[Any] = [remote_worker.remote(function, timeout_seconds) for _ in range(num_workers)]
    pool = ActorPool(actors)
    waiting: deque[Item] = deque()
    try:
        for item in items:
            pool.submit(lambda actor, given: actor.call.remote(given), item)
            waiting.append(item)
            if len(waiting) >= ITEMS_IN_FLIGHT_PER_WORKER * num_workers:
                yield waiting.popleft(), pool.get_next()
        while waiting:
            yield waiting.popleft(), pool.get_next()
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"Ray gave up ({reason}): run the same command again to go on") from None
    finally:
        for actor in actors:
            ray.kill(actor)


def _serve(function: Callable[[Item], Result], items: Connection, results: Connection) -> None:
    """A worker's whole life."""
    # The kernel ends this process when the build's end of the pipe closes (SIGIO), however the build ends, even
    # where a decoder hangs with the interpreter's lock. Ctrl-C reaches every process of a terminal: the build
    # answers it.
    build = multiprocessing.parent_process()
    assert build is not None
    fcntl.fcntl(build.sentinel, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(build.sentinel, fcntl.F_SETFL, os.O_ASYNC)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_freed_memory()
    results.send("ready")
    while True:
        try:
            item = items.recv()
        except EOFError:
            return
        try:
            answer: tuple[Any, Exception | None] = function(item), None
        except Exception as error:  # whatever it is, it is raised where the item came from
            answer = None, error
        results.send(answer)
