"""Which files there are, and which content they have at present."""

from __future__ import annotations

from audiotext_dist.errors import UserError
from audiotext_dist.retry import RetryConfig, answer, may_pass
from audiotext_dist.storage.filesystems import fresh_filesystem
from audiotext_dist.storage.paths import HTTP, expand_braces, public_name, scheme_of, with_scheme


def exists(path: str, retry: RetryConfig | None = None) -> bool:
    """True if the file or folder is there."""

    def ask() -> bool:
        filesystem, inner = fresh_filesystem(path, retry)
        if scheme_of(path) not in HTTP:
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
        filesystem, inner = fresh_filesystem(folder, retry)
        return [str(entry) for entry in filesystem.ls(inner, detail=False)] if filesystem.isdir(inner) else []

    names = answer("list", public_name(folder), retry, ask)
    return sorted(with_scheme(folder, name.rstrip("/")) for name in names if name.endswith(suffix))


def expand(spec: str, suffix: str, retry: RetryConfig | None = None) -> list[str]:
    """The files a user's shard spec names: a folder, a glob, ``{000..123}`` braces, or ``::``-joined specs.

    Raises:
        UserError: nothing matches.
    """
    files: list[str] = []
    for part in spec.split("::"):
        for pattern in expand_braces(part):
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
        filesystem, inner = fresh_filesystem(pattern, retry)
        return [with_scheme(pattern, str(name)) for name in filesystem.glob(inner)]

    return answer("list", public_name(pattern), retry, ask)


def identity(path: str, retry: RetryConfig) -> dict[str, str]:
    """What a file's server or disk says of its present content: size, ETag, time of change, as far as it does."""
    kept = ("size", "etag", "content-md5", "digest", "md5hash", "lastmodified", "last-modified", "updated", "mtime")

    def ask() -> dict[str, str]:
        filesystem, inner = fresh_filesystem(path, retry)
        try:
            found = filesystem.info(inner)
        except FileNotFoundError as error:
            # fsspec says so of any answer of a web server that is no success.
            if scheme_of(path) in HTTP and isinstance(error.__cause__, Exception):
                raise error.__cause__ from None
            raise
        return {name.lower(): str(value) for name, value in found.items() if name.lower() in kept and value is not None}

    return answer("look for", public_name(path), retry, ask)
