"""Files wherever fsspec reaches (local paths, s3://, https://, ...). The only fsspec import.

Paths are plain strings: a local path or a URL. Writes are atomic on local disks (written beside, then
renamed) and whole-object on object stores, so a reader never meets half a file. What a disk or a server
refuses is a ``UserError`` that names the file and shows no credentials. Object stores take their endpoint,
credentials and number of attempts from the environment (AWS_ENDPOINT_URL, AWS_PROFILE, AWS_MAX_ATTEMPTS, ...).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
from braceexpand import braceexpand
from filelock import FileLock, Timeout

from audiotext_dist.errors import UserError

DEFAULT_CACHE_DIR = "~/.cache/audiotext_dist/shards"


def is_remote(path: str) -> bool:
    """True for ``scheme://...`` other than ``file://``."""
    return "://" in path and not path.startswith("file://")


def public_name(path: str) -> str:
    """The path without user, password or query: safe for logs and error messages."""
    if not is_remote(path):
        return path
    return re.sub(r"://[^/@]*@", "://", path).split("?", 1)[0]


def join(folder: str, name: str) -> str:
    """``folder/name`` for local paths and URLs alike."""
    return f"{folder.rstrip('/')}/{name}"


def exists(path: str) -> bool:
    """True if the file or folder is there."""
    with _refusals_named("look for", path):
        filesystem, inner = _fresh_filesystem(path)
        return bool(filesystem.exists(inner))


def list_files(folder: str, suffix: str) -> list[str]:
    """Every file right under ``folder`` whose name ends with ``suffix``, sorted; ``[]`` if no folder."""
    with _refusals_named("list", folder):
        filesystem, inner = _fresh_filesystem(folder)
        if not filesystem.isdir(inner):
            return []
        names = [str(entry) for entry in filesystem.ls(inner, detail=False)]
    scheme = f"{urlsplit(folder).scheme}://" if is_remote(folder) else ""
    return sorted(name if "://" in name else scheme + name.rstrip("/") for name in names if name.endswith(suffix))


def expand(spec: str, suffix: str) -> list[str]:
    """The files a user's shard spec names: a folder, a glob, ``{000..123}`` braces, or ``::``-joined specs.

    Raises:
        UserError: nothing matches.
    """
    files: list[str] = []
    for part in spec.split("::"):
        for pattern in _braces(part):
            if "*" in pattern:
                filesystem, inner = fsspec.core.url_to_fs(pattern)
                scheme = f"{urlsplit(pattern).scheme}://" if is_remote(pattern) else ""
                files += sorted(scheme + str(name) for name in filesystem.glob(inner) if str(name).endswith(suffix))
            elif pattern.endswith(suffix):
                if not exists(pattern):
                    raise UserError(f"no such file: {public_name(pattern)}")
                files.append(pattern)
            else:
                files += list_files(pattern, suffix)
    if not files:
        raise UserError(f"no *{suffix} files at {public_name(spec)}: check the path, or build the shards first")
    return files


def _braces(pattern: str) -> list[str]:
    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"cannot read the braces of {public_name(pattern)} ({error}): write {{00000..00123}}") from None


def check_no_credentials(path: str) -> None:
    """Raise ``UserError`` for a URL with a password or a signature: recipes are saved, and logged to W&B."""
    if is_remote(path) and path != public_name(path):
        raise UserError(
            f"{public_name(path)} is given with credentials in it: put them into the environment "
            "(AWS_ACCESS_KEY_ID, FSSPEC_...) or the backend's own configuration file"
        )


def read_bytes(path: str) -> bytes:
    """The whole file.

    Raises:
        FileNotFoundError: it is not there.
    """
    with _refusals_named("read", path), fsspec.open(path, "rb") as file:
        return bytes(file.read())


def read_range(path: str, start: int, stop: int) -> bytes:
    """The bytes from ``start`` to before ``stop``, fewer where the file ends earlier; of a URL no more is fetched.

    Raises:
        FileNotFoundError: it is not there.
    """
    with _refusals_named("read", path):
        filesystem, inner = fsspec.core.url_to_fs(path)
        return bytes(filesystem.cat_file(inner, start=start, end=stop))


def write_bytes(path: str, content: bytes) -> None:
    """Write the whole file; locally under a temporary name, synced, then renamed."""
    if is_remote(path):
        with _refusals_named("write", path):
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
    with _refusals_named("write", str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_file(path: str) -> Iterator[Path]:
    """Yield a local path to write to; on a clean exit its content is at ``path``, local or remote."""
    if not is_remote(path):
        with atomic_local_file(Path(path)) as temporary:
            yield temporary
        return
    # A file without a name in any folder: nothing of it stays behind where the process is killed.
    with _refusals_named("write", path), tempfile.TemporaryFile() as file:
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
    with _refusals_named("write", path):
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


def remove(path: str, missing_ok: bool = False) -> None:
    """Delete one file."""
    with _refusals_named("remove", path):
        filesystem, inner = fsspec.core.url_to_fs(path)
        try:
            filesystem.rm_file(inner)
        except FileNotFoundError:
            if not missing_ok:
                raise


def local_copy(
    path: str, expected_bytes: int | None = None, expected_sha256: str | None = None, cache_dir: str = DEFAULT_CACHE_DIR
) -> Path:
    """A local file with the content of ``path``; a remote one is fetched whole into ``cache_dir``, once a node.

    The cached name holds a digest of the full URL, so equal base names cannot meet. What is expected of the file
    is checked when it is fetched; a cached one of another size is fetched again.

    Raises:
        UserError: the file at ``path`` is not the one that is expected.
    """
    if not is_remote(path):
        return Path(path.removeprefix("file://"))
    digest = hashlib.sha256(path.encode()).hexdigest()[:20]
    target = Path(cache_dir).expanduser() / f"{digest}-{Path(urlsplit(path).path).name}"

    def is_cached() -> bool:
        return target.exists() and expected_bytes in (None, target.stat().st_size)

    if is_cached():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not is_cached():
            filesystem, inner = fsspec.core.url_to_fs(path)
            with atomic_local_file(target) as temporary:
                filesystem.get_file(inner, str(temporary))
                if expected_sha256 not in (None, sha256_of(temporary)):
                    raise UserError(f"{public_name(path)} is not what its index describes: build or copy it again")
    return target


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a local file, read in blocks."""
    return digest(str(path))[1]


def digest(path: str) -> tuple[int, str]:
    """(bytes, hex SHA-256) of a file, read in blocks."""
    sha256, num_bytes = hashlib.sha256(), 0
    with _refusals_named("read", path), fsspec.open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
            num_bytes += len(block)
    return num_bytes, sha256.hexdigest()


def _fresh_filesystem(path: str) -> tuple[Any, str]:
    """The file system of a path, without what it remembers of files that other jobs may have changed."""
    filesystem, inner = fsspec.core.url_to_fs(path)
    filesystem.invalidate_cache()
    return filesystem, inner


@contextlib.contextmanager
def _refusals_named(action: str, path: str) -> Iterator[None]:
    """Say in one line what a disk or a server refused; what is not there is the caller's to judge."""
    try:
        yield
    except FileNotFoundError:
        if action == "write":
            raise UserError(f"cannot write {public_name(path)}: there is no such folder or bucket, make it") from None
        raise
    except _refusals() as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"cannot {action} {public_name(path)} ({reason}): mend the cause, then run the same command again"
        ) from None


def _refusals() -> tuple[type[Exception], ...]:
    """The system's errors, and those that s3fs lets through of the library below it, where that is at work."""
    loaded = sys.modules.get("botocore.exceptions")
    return (OSError,) if loaded is None else (OSError, loaded.BotoCoreError, loaded.ClientError)
