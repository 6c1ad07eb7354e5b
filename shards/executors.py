"""Where the work of a build runs: worker processes on this machine, or on the machines of a Ray cluster.

1. Each worker is one process behind one pipe, so the build knows which item each of them holds.
2. A worker that dies or takes too long is killed and replaced; its item, and no other, is lost.
3. Results come back in the order of the items, and only a few wait at a time.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import queue
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Generic, Literal, TypeVar

from audiotext_dist.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
Lost = Literal["crashed", "timeout"]
Executor = Literal["local", "ray"]

ITEMS_IN_FLIGHT_PER_WORKER = 4
# Imported once, by the process that workers are forked from: a worker starts in milliseconds.
PRELOADED = ["shards.job"]


class Worker(Generic[Item, Result]):
    """A process that applies one function to one item at a time; it starts with the first item."""

    def __init__(self, function: Callable[[Item], Result], timeout_seconds: float | None) -> None:
        self._function = function
        self._timeout_seconds = timeout_seconds
        self._process: Any = None
        self._connection: Connection

    def call(self, item: Item) -> Result | Lost:
        """``function(item)``, or how the process was lost over it; the next call starts another.

        Raises:
            UserError: no process can be started.
            Exception: what the function raised.
        """
        if self._process is None:
            self._start()
        try:
            self._connection.send(item)
            if not self._connection.poll(self._timeout_seconds):
                self.end()
                return "timeout"
            result, error = self._connection.recv()
        except (EOFError, ConnectionError):
            self.end()
            return "crashed"
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]

    def kill(self) -> None:
        """End the process without waiting, from any thread; a call that waits for it returns."""
        if (process := self._process) is not None:
            process.kill()

    def end(self) -> None:
        """End the process, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None

    def _start(self) -> None:
        # Not fork: the build has threads, and its decoders may too.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._function, theirs), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._connection.recv()
        except (EOFError, ConnectionError):
            self.end()
            raise UserError("worker processes do not start (out of memory?): give fewer num_workers") from None


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
            yield from _call_in_order([worker.call for worker in workers], items, [worker.kill for worker in workers])
        finally:
            for worker in workers:
                worker.end()


def _on_ray(
    function: Callable[[Item], Result], items: Iterable[Item], num_workers: int, timeout_seconds: float | None
) -> Generator[tuple[Item, Result | Lost], None, None]:
    try:
        import ray
    except ImportError:
        raise UserError("executor=ray needs Ray: pip install 'audiotext-dist[ray]', or give executor=local") from None
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    # A lost machine is no fault of the item: Ray starts the actor elsewhere and calls again.
    remote_worker = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=-1)(Worker)
    actors: list[Any] = [remote_worker.remote(function, timeout_seconds) for _ in range(num_workers)]

    def caller(actor: Any) -> Callable[[Item], Result | Lost]:
        return lambda item: ray.get(actor.call.remote(item))

    try:
        yield from _call_in_order(list(map(caller, actors)), items, [partial(ray.kill, actor) for actor in actors])
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"Ray gave up ({reason}): run the same command again to go on") from None


def _call_in_order(
    calls: Sequence[Callable[[Item], Result]], items: Iterable[Item], stops: Sequence[Callable[[], None]]
) -> Generator[tuple[Item, Result], None, None]:
    """Give each item to whichever callable is free, one item at a time each; ``stops`` end those under way."""
    free: queue.SimpleQueue[Callable[[Item], Result]] = queue.SimpleQueue()
    for call in calls:
        free.put(call)

    def call_a_free_one(item: Item) -> Result:
        call = free.get()
        try:
            return call(item)
        finally:
            free.put(call)

    waiting: deque[tuple[Item, Future[Result]]] = deque()
    threads = ThreadPoolExecutor(len(calls))
    try:
        for item in items:
            waiting.append((item, threads.submit(call_a_free_one, item)))
            if len(waiting) >= ITEMS_IN_FLIGHT_PER_WORKER * len(calls):
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for stop in stops:
            stop()
        threads.shutdown()


def _serve(function: Callable[[Item], Result], connection: Connection) -> None:
    """A worker's whole life."""
    # The kernel ends this process when the build's end of the pipe closes (SIGIO), however the build ends, even
    # where a decoder hangs with the interpreter's lock. Ctrl-C reaches every process of a terminal: the build
    # answers it.
    build = multiprocessing.parent_process()
    assert build is not None
    fcntl.fcntl(build.sentinel, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(build.sentinel, fcntl.F_SETFL, os.O_ASYNC)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection.send("ready")
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        try:
            answer: tuple[Any, Exception | None] = function(item), None
        except Exception as error:  # whatever it is, it is raised where the item came from
            answer = None, error
        connection.send(answer)
