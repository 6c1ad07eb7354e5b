"""Remote shards on a node's own disk: fetched whole, once for all its processes, the longest unused removed first.

1. A file's name holds a digest of its full URL, so equal base names cannot meet, and of its content's SHA-256 where
   that is known, so a shard that was built anew is another file. Its time of change is when it was last opened.
2. Who does not find a file takes its lock, makes room, and fetches it as ``NAME.part``, whose full size is set at
   once: so the sizes in the folder are what the cache takes up, fetches under way included.
3. What has arrived is checked against the index, then renamed. A reader gets it open: removed meanwhile, it stays
   readable until it is closed, which is before the reader's next batch.
4. Each process that fetches ahead says in ``NAME.wanted`` what it will read soon: that is removed last.
5. Where a server is given up, all those that waited for the lock meanwhile are told the same: each would else wait as
   long again, one after the other.
6. Locks end with their process. Whoever makes room removes what killed processes left.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from filelock import Timeout

from audiotext_dist import storage
from audiotext_dist.data.cache_folder import NOTE, CacheFolder, name_of, touch
from audiotext_dist.data.read_counts import ReadCounts
from audiotext_dist.errors import UserError
from audiotext_dist.retry import GaveUpError, RefusalError, RetryConfig, gave_up

# Somebody who only looks whether a lock was left behind holds it for less.
LOOK_SECONDS = 0.1


def default_folder() -> str:
    """Where the environment or else the home folder says."""
    return os.environ.get("AUDIOTEXT_CACHE_DIR", "~/.cache/audiotext_dist/shards")


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
        name, began_ns = name_of(path, sha256), time.time_ns()
        found = self._open_cached(name, num_bytes)
        if found is not None:
            counts.cache_hits += 1
            return found
        counts.prefetch_waits += 1
        with self._folder.alone(name):
            return self._found_or_fetched(path, num_bytes, sha256, counts, refused_since_ns=began_ns)

    def fetch_ahead(self, path: str, *, num_bytes: int, sha256: str | None, counts: ReadCounts) -> bool:
        """See that a remote file is there; False where another process is fetching it just now.

        What was refused a short while ago is left to whoever reads it: those wait for the lock.

        Raises:
            UserError: as ``open``.
        """
        lately_ns = time.time_ns() - round(self.retry.longest_seconds * 1e9)
        name = name_of(path, sha256)
        try:
            with contextlib.ExitStack() as held:
                descriptor = self._open_cached(name, num_bytes)
                if descriptor is None:
                    held.enter_context(self._folder.alone(name, wait_seconds=LOOK_SECONDS))
                    descriptor = self._found_or_fetched(path, num_bytes, sha256, counts, refused_since_ns=lately_ns)
                os.close(descriptor)
            return True
        except Timeout:
            return False

    def forget(self, path: str, sha256: str | None = None) -> None:
        """Remove what is held of a remote file, which is not what it should be."""
        self._folder.file(name_of(path, sha256)).unlink(missing_ok=True)

    def holds(self, path: str, inode: int) -> bool:
        """Whether a remote file that was opened here is still in the folder."""
        with contextlib.suppress(FileNotFoundError):
            return self._folder.file(name_of(path)).stat().st_ino == inode
        return False

    def know(self, path: str, sha256: str) -> None:
        """Say what the content of a remote file is that was opened without; who asks for that finds it here."""
        if storage.is_remote(path):
            with contextlib.suppress(FileNotFoundError):  # driven out meanwhile
                self._folder.file(name_of(path)).replace(self._folder.file(name_of(path, sha256)))

    def wishes(self) -> AbstractContextManager[Callable[[Iterable[str]], None]]:
        """See ``CacheFolder``."""
        return self._folder.wishes()

    def note(self, path: str, identity: str, make: Callable[[], bytes]) -> bytes:
        """What ``make`` says of the file at ``path``: kept, and made again when the file's identity is another.

        A note counts as the shards do, and goes after them.
        """
        name = name_of(path) + NOTE
        with self._folder.alone(name):
            found = self._read_note(name, identity)
            if found is None:
                # The shard itself, if it is here, may be of the old identity as well.
                self.forget(path)
                found = make()
                try:
                    with contextlib.closing(self._folder.reserve(name, len(identity) + 1 + len(found))) as part:
                        part.write(identity.encode() + b"\n" + found)
                        part.flush()
                        Path(part.name).replace(self._folder.file(name))
                except OSError as error:
                    raise self._folder.unusable(error) from None
        return found

    @property
    def _folder(self) -> CacheFolder:
        return CacheFolder(path=self.folder, max_bytes=self.max_bytes)

    def _read_note(self, name: str, identity: str) -> bytes | None:
        with contextlib.suppress(FileNotFoundError):
            kept, _, note = self._folder.file(name).read_bytes().partition(b"\n")
            touch(self._folder.file(name))
            return note if kept == identity.encode() else None
        return None

    def _open_cached(self, name: str, num_bytes: int | None) -> int | None:
        file = self._folder.file(name)
        try:
            descriptor = os.open(file, os.O_RDONLY)
        except FileNotFoundError:
            return None
        if num_bytes not in (None, os.fstat(descriptor).st_size):
            os.close(descriptor)
            return None
        touch(file)
        return descriptor

    def _found_or_fetched(
        self, path: str, num_bytes: int | None, sha256: str | None, counts: ReadCounts, *, refused_since_ns: int
    ) -> int:
        """A descriptor of what is locked: another process may have fetched it meanwhile, or been refused."""
        name = name_of(path, sha256)
        found = self._open_cached(name, num_bytes)
        if found is not None:
            return found
        refusal = self._folder.refusal(name, refused_since_ns)
        if refusal is not None:
            raise UserError(refusal)
        try:
            return self._fetch(path, num_bytes, sha256, counts)
        except GaveUpError as error:
            self._folder.keep_refusal(name, str(error))
            raise

    def _fetch(self, path: str, num_bytes: int | None, sha256: str | None, counts: ReadCounts) -> int:
        """Fetch what is locked; a descriptor of it."""
        name = name_of(path, sha256)
        counts.cache_misses += 1
        try:
            if num_bytes is None:
                num_bytes = int(storage.identity(path, self.retry).get("size", 0)) or None
            with contextlib.closing(self._folder.reserve(name, num_bytes or 0)) as part:
                try:
                    self._receive(path, part, num_bytes, sha256, counts)
                    descriptor = os.open(part.name, os.O_RDONLY)
                    touch(Path(part.name))
                    Path(part.name).replace(self._folder.file(name))
                finally:
                    Path(part.name).unlink(missing_ok=True)
        except FileNotFoundError:
            raise UserError(f"{storage.public_name(path)} is not there any more: copy it again") from None
        except OSError as error:
            raise self._folder.unusable(error) from None
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
