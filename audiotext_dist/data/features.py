"""Rows of feature files beside decoded clips: see ``feature_files.py`` for what these hold."""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from audiotext_dist import storage
from audiotext_dist.data.bad_samples import BadSampleError
from audiotext_dist.data.cache import NodeCache
from audiotext_dist.data.decode import Clip, TeacherRows
from audiotext_dist.data.encoders import Modality
from audiotext_dist.data.feature_files import (
    OFFSETS,
    FeatureFile,
    ShardFeatures,
    content_sha256,
    read_feature_file,
)
from audiotext_dist.data.plan import Slot
from audiotext_dist.data.prefetch import RemoteFile
from audiotext_dist.data.read_counts import ReadCounts
from audiotext_dist.errors import UserError


class _Opened(NamedTuple):
    """Slices of a mapped file, and by which number the disk knows it."""

    tensors: dict[str, Any]
    inode: int


class FeatureReader:
    """Reads rows of feature files; maps them lazily, so it may cross into worker processes.

    Args:
        features: one a shard, in the order in which the shards are numbered.
        modality: which of their tensors is read.
        cache: where remote files are held.
        max_open_files: least recently used files are closed above this number.
    """

    def __init__(
        self,
        features: Sequence[ShardFeatures],
        modality: Modality,
        cache: NodeCache | None = None,
        *,
        max_open_files: int = 128,
    ) -> None:
        self._features, self._modality, self._max_open_files = features, modality, max_open_files
        self._cache = NodeCache() if cache is None else cache
        self._counts = ReadCounts()
        self._opened: OrderedDict[int, _Opened] = OrderedDict()
        self._verified: set[int] = set()

    def read(self, shard: int, row: int) -> NDArray[np.float32]:
        """A row's embeddings: float32 [frames, captions or 1, D].

        Raises:
            BadSampleError: the row could not be embedded.
            UserError: the file is damaged, or is not the one that was there when the run began.
        """
        reason = self._features[shard].file.header.missing.get(str(row))
        if reason is not None:
            raise BadSampleError(f"not embedded ({reason})", "not_embedded")
        tensors = self._open(shard)
        found: NDArray[np.floating[Any]]
        if self._modality == "text":
            start, stop = tensors[OFFSETS][row : row + 2]
            found = tensors["text"][int(start) : int(stop)]
        else:
            found = tensors[self._modality][row]
        self._counts.bytes_read += found.nbytes
        return found.astype(np.float32)

    @property
    def has_remote(self) -> bool:
        """True where a file is read from the node's cache."""
        return any(storage.is_remote(features.path) for features in self._features)

    def remote_file(self, shard: int) -> RemoteFile | None:
        """A shard's file, if it is read from the node's cache, and can be had: if not, ``read`` says why."""
        if storage.is_remote(self._features[shard].path):
            with contextlib.suppress(UserError):
                file = self._features[shard].file
                return RemoteFile(file.path, file.num_bytes, None)
        return None

    def take_counts(self) -> ReadCounts:
        """What reading cost since the last call."""
        taken, self._counts = self._counts, ReadCounts()
        return taken

    def close_removed(self) -> None:
        """Close remote files that the cache has removed: for as long as they are mapped, they take up its disk."""
        for shard, opened in list(self._opened.items()):
            path = self._features[shard].path
            if storage.is_remote(path) and not self._cache.holds(path, opened.inode):
                del self._opened[shard]
                self._verified.discard(shard)  # what is fetched in its place is proved anew

    def _open(self, shard: int) -> dict[str, Any]:
        if shard in self._opened:
            self._opened.move_to_end(shard)
            return self._opened[shard].tensors
        file = self._features[shard].file
        descriptor = _descriptor(file, self._cache, self._counts)
        names = [self._modality, OFFSETS] if self._modality == "text" else [self._modality]
        try:
            # The slices keep the file mapped, even where the cache removes it.
            opened = safe_open(f"/proc/self/fd/{descriptor}", framework="numpy")
            if shard not in self._verified:
                _verify(file, opened)
                self._verified.add(shard)
            tensors = {name: opened.get_slice(name) for name in names}  # type: ignore[no-untyped-call]
            self._opened[shard] = _Opened(tensors, os.fstat(descriptor).st_ino)
        except (SafetensorError, OSError) as error:  # a file without this tensor, too
            shown = storage.public_name(file.path)
            raise UserError(f"{shown} cannot be read ({error}): make it anew with launch/embed.py") from None
        finally:
            os.close(descriptor)
        if len(self._opened) > self._max_open_files:
            self._opened.popitem(last=False)
        return tensors

    def __getstate__(self) -> dict[str, object]:
        # Mapped files belong to one process.
        return {**self.__dict__, "_opened": OrderedDict()}


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """What one model of stage 1 says of every clip and every caption."""

    audio: FeatureReader
    captions: FeatureReader


@dataclass(frozen=True, kw_only=True)
class Features:
    """What a run reads instead of pictures and captions, None: its towers embed them; and what its teachers say."""

    frames: FeatureReader | None = None
    captions: FeatureReader | None = None
    teachers: tuple[Teacher, ...] = ()

    @property
    def readers(self) -> list[FeatureReader]:
        """All of these."""
        of_teachers = [reader for teacher in self.teachers for reader in (teacher.audio, teacher.captions)]
        return [*(reader for reader in (self.frames, self.captions) if reader is not None), *of_teachers]

    @property
    def has_remote(self) -> bool:
        """True where a file is read from the node's cache."""
        return any(reader.has_remote for reader in self.readers)

    def remote_files(self, shard: int) -> Iterable[RemoteFile]:
        """What is read with a shard from the node's cache, each file once."""
        found = [reader.remote_file(shard) for reader in self.readers]
        return dict.fromkeys(file for file in found if file is not None)

    def close_removed(self) -> None:
        """Close remote files that the cache has removed."""
        for reader in self.readers:
            reader.close_removed()

    def take_counts(self) -> ReadCounts:
        """What reading cost since the last call."""
        counts = ReadCounts()
        for reader in self.readers:
            counts += reader.take_counts()
        return counts

    def added_to(self, clip: Clip, slot: Slot) -> Clip:
        """The clip with the embeddings of every frame and every caption, by the frozen towers and by the teachers.

        Raises:
            BadSampleError: the clip could not be embedded.
            UserError: it has another number of captions now.
        """
        if self.frames is not None:
            clip = replace(clip, frame_embeddings=self.frames.read(slot.shard, slot.row))
        if self.captions is not None:
            clip = replace(clip, caption_embeddings=_captions_of(clip, slot, self.captions))
        teachers = tuple(
            TeacherRows(each.audio.read(slot.shard, slot.row), _captions_of(clip, slot, each.captions))
            for each in self.teachers
        )
        return replace(clip, teachers=teachers) if teachers else clip


def _captions_of(clip: Clip, slot: Slot, reader: FeatureReader) -> NDArray[np.float32]:
    embeddings_CD = reader.read(slot.shard, slot.row)
    if len(embeddings_CD) != len(clip.metadata.text):
        raise UserError(
            f"clip {clip.key} has {len(clip.metadata.text)} captions and {len(embeddings_CD)} caption embeddings: "
            "its shard was changed under its index, build or copy it again"
        )
    return embeddings_CD


def _verify(file: FeatureFile, opened: Any) -> None:
    tensors = ((name, opened.get_tensor(name)) for name in sorted(opened.keys()))
    if content_sha256(tensors) != file.header.content_sha256:
        raise UserError(
            f"{storage.public_name(file.path)} is damaged (its content has another checksum): "
            "make it anew with launch/embed.py overwrite=true"
        )


def _descriptor(file: FeatureFile, cache: NodeCache, counts: ReadCounts) -> int:
    """A descriptor of this content; what the node holds from before the file was made anew is fetched again."""
    shown = storage.public_name(file.path)
    for _ in range(2):
        try:
            descriptor = cache.open(file.path, num_bytes=file.num_bytes, counts=counts)
        except FileNotFoundError:
            raise UserError(f"{shown} is gone since the run began: make it anew with launch/embed.py") from None
        if read_feature_file(f"/proc/self/fd/{descriptor}").header == file.header:
            return descriptor
        os.close(descriptor)
        if not storage.is_remote(file.path):
            break
        cache.forget(file.path)
    raise UserError(f"{shown} has another content than when the run began, or is cut short: start the run again")
