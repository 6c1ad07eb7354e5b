"""What frozen encoders say of a shard, stored beside it: one file a shard, its rows those of the shard's index.

``00000.tar`` has ``00000.NAME.safetensors``, written by ``data/embedding.py``, with any of these tensors, in fp32
or fp16, of unit length:

    image           [rows, L, D]    every frame
    audio           [rows, 1, D]    the clip's beginning
    text            [captions, D]   every caption, row after row
    text_offsets    int64 [rows + 1]    row r has the captions from text_offsets[r] to before text_offsets[r + 1]

The header says which encoder made it, of which shard, and which rows could not be embedded. The headers of up to
``NUM_CHECKED`` files of a set are read before a run starts, of a larger set those of as many shards drawn from all of
it; the others when their shards are. A file of another encoder or another shard is refused, and so is one whose content
does not have the header's checksum, which each reading process looks at once. The rows are read one by one from the
mapped file; a remote file is first copied to the node, like a shard.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import struct
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from audiotext_dist import storage
from audiotext_dist.data.encoders import Encoder, Modality
from audiotext_dist.data.index import SHARD_SUFFIX
from audiotext_dist.data.shard import Shard
from audiotext_dist.errors import UserError
from audiotext_dist.retry import RetryConfig

FEATURE_SUFFIX = ".safetensors"
FEATURE_VERSION = 1
# safetensors writes several entries in an order that changes from process to process: ours is the only one.
METADATA_KEY = "features"
OFFSETS = "text_offsets"
HEADERS_READ_AT_ONCE = 16
NUM_CHECKED = 1024
_MAX_OPEN_HEADERS = 8 * NUM_CHECKED  # in one process, some kilobytes each
_FIRST_BYTES = 1 << 14  # most headers are shorter


@dataclass(frozen=True, kw_only=True)
class FeatureHeader:
    """What a feature file says of itself.

    missing: rows without embeddings, as text, with the reason. dtype: fp32 or fp16. content_sha256: of the tensors.
    """

    shard: str
    shard_sha256: str
    num_rows: int
    dtype: str
    encoders: dict[Modality, Encoder]
    missing: dict[str, str]
    content_sha256: str

    def to_metadata(self) -> dict[str, str]:
        """As it is handed to safetensors."""
        return {METADATA_KEY: json.dumps({"version": FEATURE_VERSION, **asdict(self)}, sort_keys=True)}


@dataclass(frozen=True, kw_only=True)
class FeatureFile:
    """A feature file's place, size and header."""

    path: str
    num_bytes: int
    header: FeatureHeader

    def check_belongs(self, shard: Shard, encoders: dict[Modality, Encoder]) -> None:
        """Raise ``UserError`` unless these encoders made the file, of this very shard."""
        header = self.header
        found = None
        if header.shard_sha256 != shard.sha256 or header.num_rows != shard.num_samples:
            found = (
                f"of another content of {shard.index.shard_name} ({header.num_rows} clips, {header.shard_sha256[:12]})"
            )
        for modality, encoder in encoders.items():
            if modality not in header.encoders:
                found = found or f"without {modality}"
            else:
                found = found or header.encoders[modality].difference(encoder)
        if found is not None:
            raise UserError(
                f"{storage.public_name(self.path)} was made {found}: embed this set under another name, "
                "or make these anew with launch/embed.py overwrite=true"
            )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ShardFeatures:
    """A shard's place for features, opened when it is first asked for what is there.

    encoders: by which it must have been made.
    """

    path: str
    shard: Shard
    encoders: dict[Modality, Encoder]
    set_name: str
    retry: RetryConfig | None

    @property
    def file(self) -> FeatureFile:
        """The file that is there.

        Raises:
            UserError: none, or one that is damaged or stale.
        """
        return _opened(self)


class _NoFileError(UserError):
    """There are no features of a shard."""


@lru_cache(maxsize=_MAX_OPEN_HEADERS)
def _opened(features: ShardFeatures) -> FeatureFile:
    try:
        file = read_feature_file(features.path, features.retry)
    except FileNotFoundError:
        raise _NoFileError(_told_missing(features, "")) from None
    file.check_belongs(features.shard, features.encoders)
    return file


def _told_missing(features: ShardFeatures, how_many: str) -> str:
    name = features.path.removesuffix(FEATURE_SUFFIX).rpartition(".")[2]
    return (
        f"data set '{features.set_name}' has no '{name}' features{how_many} "
        f"({storage.public_name(features.path)}): run launch/embed.py features={name} on it to the end"
    )


def content_sha256(tensors: Iterable[tuple[str, NDArray[Any]]]) -> str:
    """SHA-256 of the tensors' bytes, which come in the order of their names."""
    content = hashlib.sha256()
    for _, tensor in tensors:
        content.update(tensor.data)
    return content.hexdigest()


def is_damaged(path: str, content_sha256_said: str, retry: RetryConfig | None = None) -> bool:
    """Whether a feature file's content is another than its header says; all of it is read."""
    try:
        tensors = load(storage.read_bytes(path, retry))
    except SafetensorError:
        return True
    return content_sha256(sorted(tensors.items())) != content_sha256_said


def check_feature_name(name: str, key: str) -> None:
    """Raise ``UserError`` unless a name can stand in a file's name."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise UserError(f"{key}={name} cannot be part of a file's name: use letters, digits, - and _")


def feature_path(shard: Shard, name: str, folder: str | None) -> str:
    """Where a shard's features of this name stand: beside it, or in the folder."""
    beside, _, shard_name = shard.path.rpartition("/")
    return storage.join(folder or beside or ".", f"{shard_name.removesuffix(SHARD_SUFFIX)}.{name}{FEATURE_SUFFIX}")


def read_feature_file(path: str, retry: RetryConfig | None = None) -> FeatureFile:
    """The header of a feature file, and no more of it.

    Raises:
        FileNotFoundError: it is not there.
        UserError: it is no feature file.
    """
    try:
        start = storage.read_range(path, 0, _FIRST_BYTES, retry)
        (num_header_bytes,) = struct.unpack("<Q", start[:8])
        if 8 + num_header_bytes > len(start):
            start += storage.read_range(path, len(start), 8 + num_header_bytes, retry)
        tensors = json.loads(start[8 : 8 + num_header_bytes])
        found = json.loads(tensors.pop("__metadata__")[METADATA_KEY])
        if found.pop("version") != FEATURE_VERSION:
            raise ValueError("another version")
        encoders = {modality: Encoder(**encoder) for modality, encoder in found.pop("encoders").items()}
        num_bytes = 8 + num_header_bytes + max(tensor["data_offsets"][1] for tensor in tensors.values())
        if not storage.is_remote(path) and Path(path.removeprefix("file://")).stat().st_size != num_bytes:
            raise ValueError("cut short")
        return FeatureFile(path=path, num_bytes=num_bytes, header=FeatureHeader(encoders=encoders, **found))
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{storage.public_name(path)} is damaged, or no feature file of this version "
            f"({' '.join(str(error).split())[:100]}): make it anew with launch/embed.py overwrite=true"
        ) from None


def find_feature_files(
    paths: Sequence[str], retry: RetryConfig | None = None, *, refuse_damaged: bool = True
) -> list[FeatureFile | None]:
    """The headers of the files at these paths; None where there is none.

    Raises:
        UserError: one is no feature file, which counts as none without ``refuse_damaged``.
    """

    def find(path: str) -> FeatureFile | None:
        try:
            return read_feature_file(path, retry)
        except FileNotFoundError:
            return None
        except UserError:
            if refuse_damaged:
                raise
            return None

    with ThreadPoolExecutor(HEADERS_READ_AT_ONCE) as threads:
        return list(threads.map(find, paths))


def open_features(
    shards: Sequence[Shard],
    name: str,
    folder: str | None,
    encoders: dict[Modality, Encoder],
    set_name: str,
    retry: RetryConfig | None = None,
) -> list[ShardFeatures]:
    """The feature files of a set, one a shard, in the order of the shards, so many of them checked.

    Args:
        encoders: by which they must have been made.

    Raises:
        UserError: one that was looked at is missing, damaged or stale.
    """
    features = [
        ShardFeatures(
            path=feature_path(shard, name, folder), shard=shard, encoders=encoders, set_name=set_name, retry=retry
        )
        for shard in shards
    ]
    # Drawn, not every n-th: each rank of the job that makes them has every n-th shard.
    chosen = features if len(features) <= NUM_CHECKED else random.Random(0).sample(features, NUM_CHECKED)
    with ThreadPoolExecutor(HEADERS_READ_AT_ONCE) as threads:
        absent = [each for each, is_there in zip(chosen, threads.map(_is_there, chosen), strict=True) if not is_there]
    if absent:
        raise UserError(_told_missing(absent[0], f" for {len(absent)} of {len(chosen)} shards"))
    return features


def _is_there(features: ShardFeatures) -> bool:
    try:
        return features.file is not None
    except _NoFileError:
        return False
