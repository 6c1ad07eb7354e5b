"""Files wherever fsspec reaches (local paths, s3://, https://, ...). The only room that imports fsspec.

Paths are plain strings: a local path or a URL. Writes are atomic on local disks (written beside, then
renamed) and whole-object on object stores, so a reader never meets half a file. What a disk or a server
refuses is a ``UserError`` that names the file and shows no credentials. Object stores take their endpoint and
credentials from the environment (AWS_ENDPOINT_URL, AWS_PROFILE, ...).

Reads that are given a ``RetryConfig`` are tried again here, and only here: the libraries below have retries of
their own, which would multiply. Other calls leave it to them (AWS_MAX_ATTEMPTS, ...).
"""

from __future__ import annotations

from audiotext_dist.storage.finding import exists, expand, identity, list_files
from audiotext_dist.storage.paths import check_no_credentials, expand_braces, is_remote, join, public_name
from audiotext_dist.storage.reading import blocks, digest, read_bytes, read_range, sha256_of
from audiotext_dist.storage.writing import atomic_file, atomic_local_file, claimed, copy, remove, sync, write_bytes

__all__ = [
    "atomic_file",
    "atomic_local_file",
    "blocks",
    "check_no_credentials",
    "claimed",
    "copy",
    "digest",
    "exists",
    "expand",
    "expand_braces",
    "identity",
    "is_remote",
    "join",
    "list_files",
    "public_name",
    "read_bytes",
    "read_range",
    "remove",
    "sha256_of",
    "sync",
    "write_bytes",
]
