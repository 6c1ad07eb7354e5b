"""Files wherever fsspec reaches (local paths, s3://, https://, ...). The only fsspec import.

Paths are plain strings: a local path or a URL. Writes are atomic on local disks (written beside, then
renamed) and whole-object on object stores, so a reader never meets half a file. What a disk or a server
refuses is a ``UserError`` that names the file and shows no credentials. Object stores take their endpoint and
credentials from the environment (AWS_ENDPOINT_URL, AWS_PROFILE, ...).

Reads that are given a ``RetryConfig`` are tried again here, and only here: the libraries below have retries of
their own, which would multiply. Other calls leave it to them (AWS_MAX_ATTEMPTS, ...).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
from braceexpand import braceexpand
from filelock import FileLock, Timeout
from fsspec.asyn import sync

from audiotext_dist.errors import UserError
from audiotext_dist.retry import RetryConfig, answer, may_pass, refusals_named

# One request, and one piece in memory, of a file that is fetched.
BLOCK_BYTES = 16 << 20
_HTTP = ("http", "https")


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


def exists(path: str, retry: RetryConfig | None = None) -> bool:
    """True if the file or folder is there."""

    def ask() -> bool:
        filesystem, inner = _fresh_filesystem(path, retry)
        if _scheme(path) not in _HTTP:
            return bool(filesystem.exists(inner))
        try:
            # Otherwise a web server that is busy would count as one without the file.
            return bool(filesystem.exists(inner, strict=True))
        except Exception as error:
            # Stores that let nobody list them say 403 of what is not there.
            if getattr(error, "status", None) is None or may_pass(error):
                raise
            return False

    return answer("look for", public_name(path), retry, ask)


def list_files(folder: str, suffix: str, retry: RetryConfig | None = None) -> list[str]:
    """Every file right under ``folder`` whose name ends with ``suffix``, sorted; ``[]`` if no folder."""

    def ask() -> list[str]:
        filesystem, inner = _fresh_filesystem(folder, retry)
        return [str(entry) for entry in filesystem.ls(inner, detail=False)] if filesystem.isdir(inner) else []

    names = answer("list", public_name(folder), retry, ask)
    return sorted(_with_scheme(folder, name.rstrip("/")) for name in names if name.endswith(suffix))


def expand(spec: str, suffix: str, retry: RetryConfig | None = None) -> list[str]:
    """The files a user's shard spec names: a folder, a glob, ``{000..123}`` braces, or ``::``-joined specs.

    Raises:
        UserError: nothing matches.
    """
    files: list[str] = []
    for part in spec.split("::"):
        for pattern in _braces(part):
            if "*" in pattern:
                files += sorted(name for name in _glob(pattern, retry) if name.endswith(suffix))
            elif pattern.endswith(suffix):
                if not exists(pattern, retry):
                    raise UserError(f"no such file: {public_name(pattern)}")
                files.append(pattern)
            else:
                files += list_files(pattern, suffix, retry)
    if not files:
        raise UserError(f"no *{suffix} files at {public_name(spec)}: check the path, or build the shards first")
    return files


def _glob(pattern: str, retry: RetryConfig | None) -> list[str]:
    def ask() -> list[str]:
        filesystem, inner = _fresh_filesystem(pattern, retry)
        return [_with_scheme(pattern, str(name)) for name in filesystem.glob(inner)]

    return answer("list", public_name(pattern), retry, ask)


def _scheme(path: str) -> str:
    return urlsplit(path).scheme if is_remote(path) else ""


def _with_scheme(path: str, name: str) -> str:
    """A file's name as its file system gives it, as a path of the same kind as ``path``."""
    return name if "://" in name or not is_remote(path) else f"{_scheme(path)}://{name}"


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


def read_bytes(path: str, retry: RetryConfig | None = None) -> bytes:
    """The whole file.

    Raises:
        FileNotFoundError: it is not there.
    """

    def ask() -> bytes:
        filesystem, inner = _filesystem(path, retry)
        return bytes(filesystem.cat_file(inner))

    return answer("read", public_name(path), retry, ask)


def identity(path: str, retry: RetryConfig) -> dict[str, str]:
    """What a file's server or disk says of its present content: size, ETag, time of change, as far as it does."""
    kept = ("size", "etag", "content-md5", "digest", "md5hash", "lastmodified", "last-modified", "updated", "mtime")

    def ask() -> dict[str, str]:
        filesystem, inner = _fresh_filesystem(path, retry)
        try:
            found = filesystem.info(inner)
        except FileNotFoundError as error:
            # fsspec says so of any answer of a web server that is no success.
            if _scheme(path) in _HTTP and isinstance(error.__cause__, Exception):
                raise error.__cause__ from None
            raise
        return {name.lower(): str(value) for name, value in found.items() if name.lower() in kept and value is not None}

    return answer("look for", public_name(path), retry, ask)


def blocks(path: str, start: int, retry: RetryConfig) -> Iterator[tuple[int, bytes]]:
    """One attempt to read a file from byte ``start`` on: (offset, bytes) in order.

    From 0 on, whatever ``start`` says, where a server cannot begin in the middle.

    Raises:
        FileNotFoundError: it is not there.
        RefusalError: the server said no, stalled or hung up, maybe in the middle.
    """
    with refusals_named("read", public_name(path), whatever=True):
        filesystem, inner = _fresh_filesystem(path, retry)
        if _scheme(path) in _HTTP:
            yield from _http_blocks(filesystem, inner, start)
            return
        ranges = {"cache_type": "none"} if _scheme(path) == "s3" else {}
        with filesystem.open(inner, "rb", block_size=BLOCK_BYTES, **ranges) as file:
            file.seek(start)
            while block := file.read(BLOCK_BYTES):
                yield start, block
                start += len(block)


def _http_blocks(filesystem: Any, url: str, start: int) -> Iterator[tuple[int, bytes]]:
    """One GET: fsspec's own would take a body without ranges whole into memory, or ask for it again and again."""

    async def read(response: Any) -> bytes:
        pieces, num_bytes = [], 0
        # What came before an error counts; the next read meets the error again.
        with contextlib.suppress(Exception):
            while num_bytes < BLOCK_BYTES and (piece := await response.content.read(BLOCK_BYTES - num_bytes)):
                pieces.append(piece)
                num_bytes += len(piece)
        return b"".join(pieces) or bytes(await response.content.read(1))

    session = sync(filesystem.loop, filesystem.set_session)
    own = {**filesystem.kwargs}
    headers = {**own.pop("headers", {}), **({"Range": f"bytes={start}-"} if start else {})}
    response = sync(filesystem.loop, session.get, filesystem.encode_url(url), headers=headers, **own)
    try:
        if response.status == 404:
            raise FileNotFoundError(url)
        response.raise_for_status()
        offset = start if response.status == 206 else 0
        while block := sync(filesystem.loop, read, response):
            yield offset, block
            offset += len(block)
    finally:
        filesystem.loop.call_soon_threadsafe(response.close)


def read_range(path: str, start: int, stop: int, retry: RetryConfig | None = None) -> bytes:
    """The bytes from ``start`` to before ``stop``, fewer where the file ends earlier; of a URL no more is fetched.

    Raises:
        FileNotFoundError: it is not there.
    """

    def ask() -> bytes:
        filesystem, inner = _filesystem(path, retry)
        return bytes(filesystem.cat_file(inner, start=start, end=stop))

    return answer("read", public_name(path), retry, ask)


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


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a local file, read in blocks."""
    return digest(str(path))[1]


def digest(path: str) -> tuple[int, str]:
    """(bytes, hex SHA-256) of a file, read in blocks."""
    sha256, num_bytes = hashlib.sha256(), 0
    with refusals_named("read", public_name(path)), fsspec.open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
            num_bytes += len(block)
    return num_bytes, sha256.hexdigest()


def _filesystem(path: str, retry: RetryConfig | None) -> tuple[Any, str]:
    """The file system of a path, and the path as that knows it; with ``retry``, without retries of its own."""
    if retry is None or not is_remote(path):
        found: tuple[Any, str] = fsspec.core.url_to_fs(path)
        return found
    scheme, stall_seconds = _scheme(path), retry.stall_seconds
    own = fsspec.config.conf.get(scheme, {})
    options: dict[str, Any] = {}
    if scheme == "s3":
        limits = {"connect_timeout": stall_seconds, "read_timeout": stall_seconds, "retries": {"total_max_attempts": 1}}
        options["config_kwargs"] = {**limits, **own.get("config_kwargs", {})}
    elif scheme in _HTTP:
        from aiohttp import ClientTimeout

        # Not aiohttp's limit of five minutes for the whole body, which a large shard may need.
        limit = ClientTimeout(total=None, sock_connect=stall_seconds, sock_read=stall_seconds)
        options["client_kwargs"] = {"timeout": limit, **own.get("client_kwargs", {})}
    filesystem, inner = fsspec.core.url_to_fs(path, **options)
    if scheme == "s3":
        filesystem.retries = 1
    return filesystem, str(inner)


def _fresh_filesystem(path: str, retry: RetryConfig | None = None) -> tuple[Any, str]:
    """The file system of a path, without what it remembers of files that other jobs may have changed."""
    filesystem, inner = _filesystem(path, retry)
    filesystem.invalidate_cache()
    return filesystem, inner
