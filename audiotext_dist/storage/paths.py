"""Paths as plain strings, local or URLs: what can be said of them without opening anything."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from braceexpand import braceexpand

from audiotext_dist.errors import UserError

HTTP = ("http", "https")


def is_remote(path: str) -> bool:
    """True for ``scheme://...`` other than ``file://``."""
    return "://" in path and not path.startswith("file://")


def public_name(path: str) -> str:
    """The path without user, password or query: safe for logs and error messages."""
    if not is_remote(path):
        return path
    # A password may hold a slash, as AWS's do; what follows a port does not count as one.
    return re.sub(r"://(?:[^/@]*|[^/@:]+:(?!\d+/)[^@]*)@", "://", path).split("?", 1)[0]


def join(folder: str, name: str) -> str:
    """``folder/name`` for local paths and URLs alike."""
    return f"{folder.rstrip('/')}/{name}"


def check_no_credentials(path: str, key: str | None = None) -> None:
    """Raise ``UserError`` for a URL with a password or a signature: recipes are saved, and logged to W&B.

    key: of the recipe, to be named.
    """
    if is_remote(path) and path != public_name(path):
        named = public_name(path) if key is None else f"{key}={public_name(path)}"
        raise UserError(
            f"{named} is given with credentials in it (a password, or what follows a ?): put them into the environment "
            "(AWS_ACCESS_KEY_ID, FSSPEC_...) or the backend's own configuration file; of a single file, give a copy"
        )


def scheme_of(path: str) -> str:
    """``s3``, ``https``, ...; nothing for a local path."""
    return urlsplit(path).scheme if is_remote(path) else ""


def with_scheme(path: str, name: str) -> str:
    """A file's name as its file system gives it, as a path of the same kind as ``path``."""
    return name if "://" in name or not is_remote(path) else f"{scheme_of(path)}://{name}"


def expand_braces(pattern: str) -> list[str]:
    """The names that ``{000..123}`` stands for.

    Raises:
        UserError: the braces make no sense.
    """
    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"cannot read the braces of {public_name(pattern)} ({error}): write {{00000..00123}}") from None
