"""The folder of the node's cache: names, locks, room, and what its processes will read soon."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from audiotext_dist import storage
from audiotext_dist.errors import UserError

_PART, _LOCK, _WANTED, _ROOM, _REFUSED = ".part", ".lock", ".wanted", ".room", ".refused"
NOTE = ".note"


@dataclass(frozen=True, kw_only=True)
class CacheFolder:
    """One folder, shared by every process of the node that names it.

    max_bytes: what all its files may take up, and at most what the disk has.
    """

    path: str
    max_bytes: int

    def file(self, name: str) -> Path:
        """Where what has this name lies."""
        return Path(self.path).expanduser() / name

    @contextlib.contextmanager
    def alone(self, name: str, *, wait_seconds: float = -1) -> Iterator[None]:
        """Hold a name among all processes and threads of the node.

        Raises:
            Timeout: another held it for so long; below 0 this waits for ever.
        """
        try:
            self.file(name).parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.file(name + _LOCK))
            lock.acquire(timeout=wait_seconds)
        except Timeout:
            raise
        except OSError as error:
            raise self.unusable(error) from None
        try:
            yield
        finally:
            # Those that wait for it see that it is gone and make another.
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()

    def reserve(self, name: str, num_bytes: int) -> BinaryIO:
        """An empty part file that takes up ``num_bytes`` of the cache.

        Raises:
            UserError: the disk is too full even without all that may be given up.
        """
        part = self.file(name + _PART)
        with FileLock(self.file(_ROOM + _LOCK)):
            self._remove_leftovers()
            part.unlink(missing_ok=True)
            wanted = self._wanted()
            # A note is small, and it takes a whole file to make it anew: notes go after all files.
            files = sorted(
                _entries(part.parent),
                key=lambda entry: (entry[0].suffix == NOTE, entry[0].name in wanted, entry[1].st_mtime_ns),
            )
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
                    f"data.cache_dir={self.path} has no room for {num_bytes} bytes more, "
                    f"its disk allows {max(0, on_disk - taken)}: free some, or give another folder"
                )
            reserved = part.open("w+b")
            reserved.truncate(num_bytes)
        return reserved

    @contextlib.contextmanager
    def wishes(self) -> Iterator[Callable[[Iterable[str]], None]]:
        """Yield a function that says by name which files this process will read soon, in place of those before."""
        own = uuid.uuid4().hex

        def say(names: Iterable[str]) -> None:
            written = self.file(own + _PART)
            written.write_text("\n".join(names))
            written.replace(self.file(own + _WANTED))

        with self.alone(own):
            try:
                yield say
            finally:
                self.file(own + _WANTED).unlink(missing_ok=True)

    def keep_refusal(self, name: str, message: str) -> None:
        """Leave to those that wait for a name's lock why its file cannot be had."""
        file = self.file(name + _REFUSED)
        with contextlib.suppress(OSError):  # a full disk: each of them asks again
            file.write_text(message)
            touch(file)

    def refusal(self, name: str, since_ns: int) -> str | None:
        """What was left of a name whose lock is held, if that was after this time."""
        file = self.file(name + _REFUSED)
        with contextlib.suppress(FileNotFoundError):
            if file.stat().st_mtime_ns > since_ns:
                return file.read_text()
            file.unlink()
        return None

    def unusable(self, error: OSError) -> UserError:
        """What a disk's refusal means to a person."""
        return UserError(
            f"data.cache_dir={self.path} cannot be written to ({error.strerror}): mend that, or give another folder"
        )

    def _wanted(self) -> set[str]:
        wanted: set[str] = set()
        for file in self.file("").glob(f"*{_WANTED}"):
            with contextlib.suppress(FileNotFoundError):
                wanted.update(file.read_text().split("\n"))
        return wanted

    def _remove_leftovers(self) -> None:
        """Remove the locks, part files and wishes that killed processes left; those in use are locked."""
        for lock in self.file("").glob(f"*{_LOCK}"):
            name = lock.name.removesuffix(_LOCK)
            if name != _ROOM:
                with contextlib.suppress(Timeout), self.alone(name, wait_seconds=0):
                    for suffix in (_PART, _WANTED):
                        self.file(name + suffix).unlink(missing_ok=True)


def name_of(path: str, sha256: str | None = None) -> str:
    """The name in the folder of a path's file, with this content where it is known."""
    path = path if storage.is_remote(path) else str(Path(path).absolute())
    digest = hashlib.sha256(f"{path} {sha256 or ''}".encode()).hexdigest()
    return f"{digest[:20]}-{Path(urlsplit(path).path).name}"


def touch(file: Path) -> None:
    """Mark as just used. Not by the clock of the file system, which stands still for some milliseconds."""
    with contextlib.suppress(FileNotFoundError):
        os.utime(file, ns=(time.time_ns(), time.time_ns()))


def _entries(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Every file of the cache that takes up room, with its size and time."""
    for file in folder.iterdir():
        if file.suffix not in (_LOCK, _WANTED):
            with contextlib.suppress(FileNotFoundError):
                yield file, file.stat()
