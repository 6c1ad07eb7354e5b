"""Files written whole or not at all, claimed, copied and removed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
from filelock import FileLock, Timeout

from audiotext_dist.retry import refusals_named
from audiotext_dist.storage.paths import is_remote, public_name
from audiotext_dist.storage.reading import BLOCK_BYTES


def write_bytes(path: str, content: bytes) -> None:
    """Write the whole file; locally under a temporary name, synced, then renamed."""
    if is_remote(path):
        with refusals_named("write", public_name(path)):
            filesystem, inner = fsspec.core.url_to_fs(path)
            filesystem.pipe_file(inner, content)
        return
    with atomic_local_file(Path(path)) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def atomic_local_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on a clean exit it is synced and becomes ``path``."""
    # Not the process's id, which another machine on the same disk may use as well.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with refusals_named("write", public_name(str(path))):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder: before that a power loss undoes them.

    Raises:
        OSError: the disk is full, or broken; a network disk may say so only here.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network disks cannot do this with folders.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: str) -> Iterator[Path]:
    """Yield a local path to write to; on a clean exit its content is at ``path``, local or remote."""
    if not is_remote(path):
        with atomic_local_file(Path(path)) as temporary:
            yield temporary
        return
    # A file without a name in any folder: nothing of it stays behind where the process is killed.
    with refusals_named("write", public_name(path)), tempfile.TemporaryFile() as file:
        temporary = Path(f"/proc/self/fd/{file.fileno()}")
        yield temporary
        filesystem, inner = fsspec.core.url_to_fs(path)
        filesystem.put_file(str(temporary), inner)


@contextlib.contextmanager
def claimed(path: str, wait: bool = False) -> Iterator[bool]:
    """Hold ``path`` among all jobs on this disk, if only as a name; what a killed job left of it is removed.

    Yields False where another job holds it (with ``wait``, not before that lets go), and always True on an
    object store, which has no locks. The lock ends with its process, however that ends.
    """
    if is_remote(path):
        yield True
        return
    target = Path(path.removeprefix("file://"))
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    with refusals_named("write", public_name(path)):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=wait)
        except Timeout:
            yield False
            return
    try:
        for half_written in target.parent.glob(f".{target.name}.*.tmp"):
            half_written.unlink()
        yield True
    finally:
        # Jobs that already wait for this file see that it is gone and make another.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def copy(source: str, target: str) -> None:
    """Copy one file between any two places, block by block; the folder of a local target must be there.

    Raises:
        FileNotFoundError: the source is not there.
    """
    with (
        refusals_named("copy", public_name(source)),
        fsspec.open(source, "rb") as reading,
        fsspec.open(target, "wb") as writing,
    ):
        shutil.copyfileobj(reading, writing, BLOCK_BYTES)


def remove(path: str, missing_ok: bool = False) -> None:
    """Delete one file."""
    with refusals_named("remove", public_name(path)):
        filesystem, inner = fsspec.core.url_to_fs(path)
        try:
            filesystem.rm_file(inner)
        except FileNotFoundError:
            if not missing_ok:
                raise
