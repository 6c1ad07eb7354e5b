"""Remote shards on a node's own disk: fetched whole, once for all its processes, the longest unused removed first.

1. A file's name holds a digest of its full URL, so equal base names cannot meet. Its time of change is when it was
   last opened.
2. Who does not find a file takes its lock, makes room, and fetches it as ``NAME.part``, whose full size is set at
   once: so the sizes in the folder are what the cache takes up, fetches under way included.
3. What has arrived is checked against the index, then renamed. A reader gets it open: removed meanwhile, it stays
   readable until it is closed, which is before the reader's next batch.
4. Each process that fetches ahead says in ``NAME.wanted`` what it will read soon: that is removed last.
5. Locks end with their process. Whoever makes room removes what killed processes left.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from audiotext_dist import storage
from audiotext_dist.errors import UserError
from audiotext_dist.retry import RefusalError, RetryConfig, gave_up

_PART, _LOCK, _WANTED, _ROOM = ".part", ".lock", ".wanted", ".room"


def default_folder() -> str:
    """Where the environment or else the home folder says."""
    return os.environ.get("AUDIOTEXT_CACHE_DIR", "~/.cache/audiotext_dist/shards")


@dataclass
class ReadCounts:
    """What reading cost since it was last asked.

    bytes_read: of members, from any disk. bytes_fetched: from remote storage. cache_hits: remote shards that
    were opened at once. cache_misses: shards that were fetched, ahead or not. prefetch_waits: reads that had to
    wait for a fetch, their own or another's.
    """

    bytes_read: int = 0
    bytes_fetched: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    prefetch_waits: int = 0

    def __iadd__(self, other: ReadCounts) -> ReadCounts:
        for entry in fields(self):
            setattr(self, entry.name, getattr(self, entry.name) + getattr(other, entry.name))
        return self


@dataclass(frozen=True, kw_only=True)
class NodeCache:
    """The cache in one folder, for every process of the node that names the same.

    max_bytes: what all its files may take up, and at most what the disk has. Only where the files that are being
    fetched at one moment are more than that, they are held without others.
    """

    folder: str = field(default_factory=default_folder)
    max_bytes: int = 100_000_000_000
    retry: RetryConfig = field(default_factory=RetryConfig)

    def open(
        self, path: str, *, num_bytes: int | None = None, sha256: str | None = None, counts: ReadCounts | None = None
    ) -> int:
        """A descriptor of the file at ``path``, a local path or a URL; whoever asks closes it.

        Args:
            num_bytes, sha256: what the file is known to be; a cached one of another size is fetched again.

        Raises:
            UserError: it cannot be had, is not what it should be, or has no room on the disk.
        """
        counts = ReadCounts() if counts is None else counts
        if not storage.is_remote(path):
            return os.open(path.removeprefix("file://"), os.O_RDONLY)
        found = self._open_cached(path, num_bytes)
        if found is not None:
            counts.cache_hits += 1
            return found
        counts.prefetch_waits += 1
        with self._alone(_name(path)):
            # Another process may have fetched it while this one waited for the lock.
            found = self._open_cached(path, num_bytes)
            return self._fetch(path, num_bytes, sha256, counts) if found is None else found

    def fetch_ahead(self, path: str, *, num_bytes: int, sha256: str, counts: ReadCounts) -> bool:
        """See that a remote file is there; False where another process is fetching it just now.

        Raises:
            UserError: as ``open``.
        """
        try:
            with contextlib.ExitStack() as held:
                descriptor = self._open_cached(path, num_bytes)
                if descriptor is None:
                    held.enter_context(self._alone(_name(path), wait=False))
                    descriptor = self._open_cached(path, num_bytes)
                if descriptor is None:
                    descriptor = self._fetch(path, num_bytes, sha256, counts)
                os.close(descriptor)
            return True
        except Timeout:
            return False

    def forget(self, path: str) -> None:
        """Remove what is held of a remote file, which has another content now."""
        self._file(_name(path)).unlink(missing_ok=True)

    @contextlib.contextmanager
    def wishes(self) -> Iterator[Callable[[Iterable[str]], None]]:
        """Yield a function that says which files this process will read soon, in place of those it said before."""
        own = uuid.uuid4().hex

        def say(paths: Iterable[str]) -> None:
            written = self._file(own + _PART)
            written.write_text("\n".join(map(_name, paths)))
            written.replace(self._file(own + _WANTED))

        with self._alone(own):
            try:
                yield say
            finally:
                self._file(own + _WANTED).unlink(missing_ok=True)

    def note(self, path: str, suffix: str, identity: str, make: Callable[[], bytes]) -> bytes:
        """What ``make`` says of the file at ``path``: kept, and made again when the file's identity is another.

        A note counts, and goes, as the shards do.
        """
        name = _name(path) + suffix
        with self._alone(name):
            found = self._read_note(name, identity)
            if found is None:
                # The shard itself, if it is here, may be of the old identity as well.
                self._file(_name(path)).unlink(missing_ok=True)
                found = make()
                try:
                    with contextlib.closing(self._reserve(name, len(identity) + 1 + len(found))) as part:
                        part.write(identity.encode() + b"\n" + found)
                        part.flush()
                        Path(part.name).replace(self._file(name))
                except OSError as error:
                    raise self._unusable(error) from None
        return found

    def _read_note(self, name: str, identity: str) -> bytes | None:
        with contextlib.suppress(FileNotFoundError):
            kept, _, note = self._file(name).read_bytes().partition(b"\n")
            _touch(self._file(name))
            return note if kept == identity.encode() else None
        return None

    def _file(self, name: str) -> Path:
        return Path(self.folder).expanduser() / name

    def _open_cached(self, path: str, num_bytes: int | None) -> int | None:
        file = self._file(_name(path))
        try:
            descriptor = os.open(file, os.O_RDONLY)
        except FileNotFoundError:
            return None
        if num_bytes not in (None, os.fstat(descriptor).st_size):
            os.close(descriptor)
            return None
        _touch(file)
        return descriptor

    @contextlib.contextmanager
    def _alone(self, name: str, *, wait: bool = True) -> Iterator[None]:
        """Hold a name among all processes and threads of the node.

        Raises:
            Timeout: not ``wait``, and another holds it.
        """
        try:
            self._file(name).parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self._file(name + _LOCK))
            lock.acquire(blocking=wait)
        except Timeout:
            raise
        except OSError as error:
            raise self._unusable(error) from None
        try:
            yield
        finally:
            # Those that wait for it see that it is gone and make another.
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()

    def _fetch(self, path: str, num_bytes: int | None, sha256: str | None, counts: ReadCounts) -> int:
        """Fetch what is held by ``_alone``; a descriptor of it."""
        name = _name(path)
        counts.cache_misses += 1
        try:
            if num_bytes is None:
                num_bytes = int(storage.identity(path, self.retry).get("size", 0)) or None
            with contextlib.closing(self._reserve(name, num_bytes or 0)) as part:
                try:
                    self._receive(path, part, num_bytes, sha256, counts)
                    descriptor = os.open(part.name, os.O_RDONLY)
                    _touch(Path(part.name))
                    Path(part.name).replace(self._file(name))
                finally:
                    Path(part.name).unlink(missing_ok=True)
        except FileNotFoundError:
            raise UserError(f"{storage.public_name(path)} is not there any more: copy it again") from None
        except OSError as error:
            raise self._unusable(error) from None
        return descriptor

    def _receive(
        self, path: str, part: BinaryIO, num_bytes: int | None, sha256: str | None, counts: ReadCounts
    ) -> None:
        """Write the whole file to ``part``: where an attempt ends early, the next goes on from there."""
        digest = hashlib.sha256()
        arrived = furthest = num_failures = 0
        while True:
            try:
                # What cannot be proved to be one file is not put together from two attempts.
                for offset, block in storage.blocks(path, arrived if sha256 else 0, self.retry):
                    if offset != arrived:
                        arrived, digest = 0, hashlib.sha256()
                        part.seek(0)
                    part.write(block)
                    digest.update(block)
                    arrived += len(block)
                    counts.bytes_fetched += len(block)
                if num_bytes is None or arrived >= num_bytes:
                    break
                error = RefusalError(
                    f"{storage.public_name(path)} ends after {arrived} of {num_bytes} bytes: build or copy it again",
                    transient=True,
                )
            except RefusalError as refusal:
                error = refusal
            num_failures = 1 if arrived > furthest else num_failures + 1
            furthest = max(arrived, furthest)
            if not error.transient:
                raise error
            if num_failures > self.retry.retries:
                raise gave_up(error, num_failures)
            time.sleep(self.retry.pause_seconds(num_failures))
        if arrived != (num_bytes or arrived) or sha256 not in (None, digest.hexdigest()):
            raise UserError(f"{storage.public_name(path)} is not what its index describes: build or copy it again")
        part.truncate()
        os.fsync(part.fileno())

    def _reserve(self, name: str, num_bytes: int) -> BinaryIO:
        """An empty part file that takes up ``num_bytes`` of the cache.

        Raises:
            UserError: the disk is too full even without all that may be given up.
        """
        part = self._file(name + _PART)
        with FileLock(self._file(_ROOM + _LOCK)):
            self._remove_leftovers()
            part.unlink(missing_ok=True)
            wanted = self._wanted()
            files = sorted(_entries(part.parent), key=lambda entry: (entry[0].name in wanted, entry[1].st_mtime_ns))
            taken = sum(entry.st_size for _, entry in files)
            promised = sum(max(0, entry.st_size - 512 * entry.st_blocks) for _, entry in files)
            on_disk = taken - promised + shutil.disk_usage(part.parent).free
            for file, entry in files:
                if taken + num_bytes <= min(self.max_bytes, on_disk):
                    break
                if file.suffix != _PART:
                    file.unlink(missing_ok=True)
                    taken -= entry.st_size
            if taken + num_bytes > on_disk:
                raise UserError(
                    f"data.cache_dir={self.folder} has no room for {num_bytes} bytes more, "
                    f"its disk allows {max(0, on_disk - taken)}: free some, or give another folder"
                )
            reserved = part.open("w+b")
            reserved.truncate(num_bytes)
        return reserved

    def _wanted(self) -> set[str]:
        wanted: set[str] = set()
        for file in self._file("").glob(f"*{_WANTED}"):
            with contextlib.suppress(FileNotFoundError):
                wanted.update(file.read_text().split("\n"))
        return wanted

    def _remove_leftovers(self) -> None:
        """Remove the locks, part files and wishes that killed processes left; those in use are locked."""
        for lock in self._file("").glob(f"*{_LOCK}"):
            name = lock.name.removesuffix(_LOCK)
            if name != _ROOM:
                with contextlib.suppress(Timeout), self._alone(name, wait=False):
                    for suffix in (_PART, _WANTED):
                        self._file(name + suffix).unlink(missing_ok=True)

    def _unusable(self, error: OSError) -> UserError:
        return UserError(
            f"data.cache_dir={self.folder} cannot be written to ({error.strerror}): mend that, or give another folder"
        )


def _name(path: str) -> str:
    path = path if storage.is_remote(path) else str(Path(path).absolute())
    return f"{hashlib.sha256(path.encode()).hexdigest()[:20]}-{Path(urlsplit(path).path).name}"


def _touch(file: Path) -> None:
    """Mark as just used. Not by the clock of the file system, which stands still for some milliseconds."""
    with contextlib.suppress(FileNotFoundError):
        os.utime(file, ns=(time.time_ns(), time.time_ns()))


def _entries(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Every file of the cache that takes up room, with its size and time."""
    for file in folder.iterdir():
        if file.suffix not in (_LOCK, _WANTED):
            with contextlib.suppress(FileNotFoundError):
                yield file, file.stat()
