"""Files read: whole, a range, or block by block as they arrive."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from fsspec.asyn import sync

from audiotext_dist.retry import RetryConfig, answer, refusals_named
from audiotext_dist.storage.filesystems import filesystem_of, fresh_filesystem
from audiotext_dist.storage.paths import HTTP, public_name, scheme_of

# One request, and one piece in memory, of a file that is fetched.
BLOCK_BYTES = 16 << 20


def read_bytes(path: str, retry: RetryConfig | None = None) -> bytes:
    """The whole file.

    Raises:
        FileNotFoundError: it is not there.
    """

    def ask() -> bytes:
        filesystem, inner = filesystem_of(path, retry)
        return bytes(filesystem.cat_file(inner))

    return answer("read", public_name(path), retry, ask)


def read_range(path: str, start: int, stop: int, retry: RetryConfig | None = None) -> bytes:
    """The bytes from ``start`` to before ``stop``, fewer where the file ends earlier; of a URL no more is fetched.

    Raises:
        FileNotFoundError: it is not there.
    """

    def ask() -> bytes:
        filesystem, inner = filesystem_of(path, retry)
        return bytes(filesystem.cat_file(inner, start=start, end=stop))

    return answer("read", public_name(path), retry, ask)


def blocks(path: str, start: int, retry: RetryConfig) -> Iterator[tuple[int, bytes]]:
    """One attempt to read a file from byte ``start`` on: (offset, bytes) in order.

    From 0 on, whatever ``start`` says, where a server cannot begin in the middle.

    Raises:
        FileNotFoundError: it is not there.
        RefusalError: the server said no, stalled or hung up, maybe in the middle.
    """
    with refusals_named("read", public_name(path), whatever=True):
        filesystem, inner = fresh_filesystem(path, retry)
        if scheme_of(path) in HTTP:
            yield from _http_blocks(filesystem, inner, start)
            return
        ranges = {"cache_type": "none"} if scheme_of(path) == "s3" else {}
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
