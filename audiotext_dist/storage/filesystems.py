"""fsspec's file systems, as reads want them."""

from __future__ import annotations

from typing import Any

import fsspec

from audiotext_dist.retry import RetryConfig
from audiotext_dist.storage.paths import HTTP, is_remote, scheme_of


def filesystem_of(path: str, retry: RetryConfig | None) -> tuple[Any, str]:
    """The file system of a path, and the path as that knows it; with ``retry``, without retries of its own."""
    if retry is None or not is_remote(path):
        found: tuple[Any, str] = fsspec.core.url_to_fs(path)
        return found
    scheme, stall_seconds = scheme_of(path), retry.stall_seconds
    own = fsspec.config.conf.get(scheme, {})
    options: dict[str, Any] = {}
    if scheme == "s3":
        limits = {"connect_timeout": stall_seconds, "read_timeout": stall_seconds, "retries": {"total_max_attempts": 1}}
        options["config_kwargs"] = {**limits, **own.get("config_kwargs", {})}
    elif scheme in HTTP:
        from aiohttp import ClientTimeout

        # Not aiohttp's limit of five minutes for the whole body, which a large shard may need.
        limit = ClientTimeout(total=None, sock_connect=stall_seconds, sock_read=stall_seconds)
        options["client_kwargs"] = {"timeout": limit, **own.get("client_kwargs", {})}
    filesystem, inner = fsspec.core.url_to_fs(path, **options)
    if scheme == "s3":
        filesystem.retries = 1
    return filesystem, str(inner)


def fresh_filesystem(path: str, retry: RetryConfig | None = None) -> tuple[Any, str]:
    """The file system of a path, without what it remembers of files that other jobs may have changed."""
    filesystem, inner = filesystem_of(path, retry)
    filesystem.invalidate_cache()
    return filesystem, inner
