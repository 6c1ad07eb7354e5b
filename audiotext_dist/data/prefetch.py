"""Remote files fetched before they are read, along the plan, by one thread of each process that reads."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from audiotext_dist import storage
from audiotext_dist.data.cache import NodeCache
from audiotext_dist.data.cache_folder import name_of
from audiotext_dist.data.read_counts import ReadCounts
from audiotext_dist.data.shard import Shard
from audiotext_dist.errors import UserError

Upcoming = Callable[[int], Iterable[int]]
# To fetch. Of small files a cache holds thousands: they would all be looked at before the first is fetched.
MAX_FILES_AHEAD = 256


class RemoteFile(NamedTuple):
    """A file that is read from the node's cache."""

    path: str
    num_bytes: int
    sha256: str | None


Beside = Callable[[int], Iterable[RemoteFile]]


def nothing(_: int) -> Iterable[RemoteFile]:
    """``Beside`` where only shards are read."""
    return ()


def each_in_turn(shards_of_batches: Sequence[Sequence[int]], number: int) -> Iterable[int]:
    """The shards that stand in a list of batches from one of these on: ``Upcoming`` where no plan says it."""
    return itertools.chain.from_iterable(itertools.islice(shards_of_batches, number, None))


class Prefetcher:
    """Keeps the files that come next in the node's cache; it may cross into worker processes.

    The workers of a rank each have one, at about the same place of the plan: they share the work, since what
    one is fetching the others pass over.

    Args:
        upcoming: the shards that are needed from a step on, in order. It must not refer to who owns this prefetcher,
            nor must ``beside``: what else is read with a shard; has_remote: whether any of that is remote.
        max_bytes: how far it looks ahead; a share of the cache, so that no rank drives out what another needs.
    """

    def __init__(
        self,
        cache: NodeCache,
        shards: Sequence[Shard],
        upcoming: Upcoming,
        *,
        max_bytes: int,
        beside: Beside = nothing,
        has_remote: bool = False,
    ) -> None:
        self._cache, self._shards, self._upcoming, self._max_bytes = cache, shards, upcoming, max_bytes
        self._beside = beside
        self._has_remote = has_remote or any(storage.is_remote(shard.path) for shard in shards)
        self._thread: _Thread | None = None
        self._process = 0

    def advance(self, step: int) -> None:
        """Say which step is read now. Returns at once."""
        if not self._has_remote:
            return
        if self._process != os.getpid():  # threads do not come along into a forked worker
            self._process = os.getpid()
            self._thread = _Thread(self._cache, self._shards, self._upcoming, self._max_bytes, self._beside)
            self._thread.start()
        assert self._thread is not None
        self._thread.advance(step)

    def wait_until_idle(self) -> None:
        """Wait until all that is wanted at the present step has been fetched, or could not be."""
        if self._thread is not None:
            self._thread.wait_until_idle()

    def take_counts(self) -> ReadCounts:
        """What was fetched since the last call."""
        return ReadCounts() if self._thread is None else self._thread.take_counts()

    def __del__(self) -> None:
        if self._thread is not None and self._process == os.getpid():
            self._thread.end()

    def __getstate__(self) -> dict[str, object]:
        # Threads belong to one process.
        return {**self.__dict__, "_thread": None, "_process": 0}


class _Thread(threading.Thread):
    """Goes where it was last told to: newer steps stand in for those that it did not get to."""

    def __init__(
        self, cache: NodeCache, shards: Sequence[Shard], upcoming: Upcoming, max_bytes: int, beside: Beside
    ) -> None:
        super().__init__(name="prefetch", daemon=True)
        self._cache, self._shards, self._upcoming, self._max_bytes = cache, shards, upcoming, max_bytes
        self._beside = beside
        self._changed = threading.Condition()
        self._step: int | None = None
        self._is_idle, self._is_over = True, False
        self._counts = ReadCounts()
        self._wanted: dict[RemoteFile, bool] = {}  # file -> whether it needs no more care here

    def advance(self, step: int) -> None:
        with self._changed:
            self._step, self._is_idle = step, self._is_over
            self._changed.notify_all()

    def end(self) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def wait_until_idle(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_idle)

    def take_counts(self) -> ReadCounts:
        with self._changed:
            taken, self._counts = self._counts, ReadCounts()
        return taken

    def run(self) -> None:
        # A folder that cannot be used: whoever reads a shard meets the same, and tells.
        with contextlib.suppress(UserError, OSError), self._cache.wishes() as say:
            while (step := self._next_step()) is not None:
                # A disk that is full for a moment does not end the work ahead.
                with contextlib.suppress(UserError, OSError):
                    self._fetch_from(step, say)
        with self._changed:
            self._is_over = self._is_idle = True
            self._changed.notify_all()

    def _next_step(self) -> int | None:
        """Wait for a step to go to, or None in the end."""
        with self._changed:
            self._is_idle = self._step is None
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._step is not None or self._is_over)
            step, self._step = self._step, None
            return None if self._is_over else step

    def _fetch_from(self, step: int, say: Callable[[Iterable[str]], None]) -> None:
        """Fetch what is missing, until there is a newer step to begin with."""
        shard_of = self._within_budget(step)
        if self._is_told_more:
            return
        if list(shard_of) != list(self._wanted):
            say(name_of(file.path, file.sha256) for file in shard_of)
        # What was driven out again is not fetched twice: where the cache is too small that would never end.
        self._wanted = {file: self._wanted.get(file, False) for file in shard_of}
        for file, is_done in self._wanted.items():
            if self._is_told_more:
                return
            if not is_done:
                self._open_index(shard_of[file])
                self._wanted[file] = self._fetch(file)

    @property
    def _is_told_more(self) -> bool:
        return self._step is not None or self._is_over

    def _within_budget(self, step: int) -> dict[RemoteFile, Shard]:
        """The files that come next, each with the shard that it is read with; fewer as soon as there is a newer step.

        To know what is read beside a shard takes a request the first time.
        """
        wanted: dict[RemoteFile, Shard] = {}
        seen: set[int] = set()
        num_bytes = num_to_fetch = 0
        for shard in self._upcoming(step):
            if shard in seen:
                continue
            seen.add(shard)
            files = list(self._files_of(shard))
            num_bytes += sum(file.num_bytes for file in files)
            num_to_fetch += sum(not self._wanted.get(file, False) for file in files)
            if num_bytes > self._max_bytes or num_to_fetch > MAX_FILES_AHEAD or self._is_told_more:
                break
            wanted |= dict.fromkeys(files, self._shards[shard])
            if len(seen) == len(self._shards):  # the whole set: all that follow are repetitions
                break
        return wanted

    def _files_of(self, number: int) -> Iterator[RemoteFile]:
        shard = self._shards[number]
        if storage.is_remote(shard.path):
            yield RemoteFile(shard.path, shard.num_bytes, shard.sha256)
        yield from self._beside(number)

    @staticmethod
    def _open_index(shard: Shard) -> None:
        """A listed shard's index stays open in this process, so that whoever reads the shard finds it there."""
        if storage.is_remote(shard.path):
            with contextlib.suppress(UserError):  # whoever reads it asks again, and tells
                _ = shard.index

    def _fetch(self, file: RemoteFile) -> bool:
        counts = ReadCounts()
        try:
            return self._cache.fetch_ahead(file.path, num_bytes=file.num_bytes, sha256=file.sha256, counts=counts)
        except UserError:
            return True  # whoever reads this file asks again, and tells
        finally:
            with self._changed:
                self._counts += counts
