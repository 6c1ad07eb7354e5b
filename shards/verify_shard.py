"""One shard, proved: what ``shards.verify`` does in its worker processes."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import soundfile
import webdataset

from audiotext_dist import storage
from audiotext_dist.data.bad_samples import BadSampleError
from audiotext_dist.data.decode import DecodeConfig, decode_clip, decode_metadata
from audiotext_dist.data.index import ShardIndex, index_path
from audiotext_dist.data.plan import Slot
from audiotext_dist.data.sample import AUDIO_MEMBER, METADATA_MEMBER, ClipMetadata, frame_member
from audiotext_dist.data.scan import scan_tar
from audiotext_dist.data.shard import Shard
from audiotext_dist.data.shard_reader import ShardReader
from audiotext_dist.errors import UserError
from shards.findings import Finding, Kind
from shards.passes import fresh_local_copy

# Frames are decoded in full whatever their size; this one keeps the resize cheap.
FRAME_PIXELS = 32
_ADDED_BY_WEBDATASET = {"__key__", "__url__", "__local_path__"}


@dataclass(kw_only=True)
class ShardFacts:
    """What one shard holds, and what is wrong with it.

    keys, recordings: of each clip. sample_rates_hz: rate -> clips. seconds: of all its audio.
    """

    split: str
    public_path: str
    findings: list[Finding] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    recordings: list[str] = field(default_factory=list)
    num_captions: int = 0
    sample_rates_hz: Counter[int] = field(default_factory=Counter)
    seconds: float = 0.0

    def add(self, kind: Kind, detail: str, key: str = "") -> None:
        """Report something wrong with the shard, or with one clip of it."""
        self.findings.append(Finding(kind, self.split, f"{self.public_path} {key}".rstrip(), detail))


def check_shard(shard: tuple[str, str], *, decode: bool) -> ShardFacts:
    """Check the shard (split, path) against its index and, with ``decode``, every clip of it.

    What the scan of the tar finds is what is checked, so a wrong index hides no clip.
    """
    split, path = shard
    facts = ShardFacts(split=split, public_path=storage.public_name(path))
    stored = _stored_index(facts, path)
    with fresh_local_copy(path) as local:
        if stored is not None and (found_bytes := local.stat().st_size) != stored.shard_bytes:
            facts.add("wrong_size", f"{found_bytes} bytes, not {stored.shard_bytes}")
        try:
            found = scan_tar(local, Path(path).name)
        except UserError as error:
            facts.add("broken_tar", str(error))
            return facts
        if stored is not None:
            _check_index(facts, stored, found)
        facts.keys, facts.recordings = found.keys, found.recordings
        _check_stream(facts, local, found)
        with contextlib.closing(ShardReader([Shard.of(str(local), found)])) as reader:
            for row, key in enumerate(found.keys):
                try:
                    _check_clip(facts, reader, found, row, decode=decode)
                except BadSampleError as error:
                    facts.add("undecodable", str(error), key)
    return facts


def _check_stream(facts: ShardFacts, local: Path, index: ShardIndex) -> None:
    """Read the tar with webdataset, as others will."""
    pipeline = webdataset.DataPipeline(webdataset.SimpleShardList([str(local)]), webdataset.tarfile_to_samples())
    try:
        streamed = [(sample["__key__"], sample.keys() - _ADDED_BY_WEBDATASET) for sample in pipeline]
    except ValueError as error:
        facts.add("unstreamable", " ".join(str(error).split())[:200])
        return
    expected = [
        (key, {member for member in index.members if index.span(row, member) is not None})
        for row, key in enumerate(index.keys)
    ]
    if streamed != expected:
        facts.add("unstreamable", f"{len(streamed)} clips, not {len(expected)}, or others: members stand apart")


def _stored_index(facts: ShardFacts, path: str) -> ShardIndex | None:
    """The index beside the shard; None where it is not there or was reported as broken."""
    beside = index_path(path)
    if not storage.exists(beside):
        return None
    try:
        return ShardIndex.from_json(storage.read_bytes(beside), storage.public_name(beside))
    except UserError as error:
        facts.add("broken_index", str(error))
        return None


def _check_index(facts: ShardFacts, stored: ShardIndex, found: ShardIndex) -> None:
    if stored.sha256 != found.sha256:
        facts.add("wrong_checksum", f"{found.sha256}, not {stored.sha256}")
    if wrong := list(_differences(stored, found)):
        facts.add("wrong_index", "; ".join(wrong))


def _differences(stored: ShardIndex, found: ShardIndex) -> Iterator[str]:
    if stored.keys != found.keys:
        yield f"it lists {stored.num_samples} clips, the tar has {found.num_samples}, or in another order"
    if stored.recordings != found.recordings:
        yield "recordings differ from those in the clips' json"
    told = (stored.num_captioned, stored.sample_rate_hz)
    if stored.num_captioned is not None and told != (found.num_captioned, found.sample_rate_hz):
        yield "captions or sample rate differ from those in the clips' json"
    for name in sorted(stored.members.keys() | found.members.keys()):
        ours, theirs = stored.members.get(name), found.members.get(name)
        if ours is None or theirs is None or ours.tolist() != theirs.tolist():
            yield f"members {name} lie elsewhere"


def _check_clip(facts: ShardFacts, reader: ShardReader, index: ShardIndex, row: int, *, decode: bool) -> None:
    """Count the clip's captions and sound, and decode all of it.

    Raises:
        BadSampleError: what training would say of this clip.
    """
    key = index.keys[row]
    metadata = decode_metadata(reader.read(0, row, METADATA_MEMBER), key)
    facts.num_captions += len(metadata.text)
    if not metadata.text:
        facts.add("no_captions", "text is empty", key)
    if any(not any(map(str.isalnum, caption)) for caption in metadata.text):
        facts.add("empty_caption", f"text is {metadata.text}", key)
    rate_hz, num_samples = _audio_size(reader.read(0, row, AUDIO_MEMBER))
    facts.sample_rates_hz[rate_hz] += 1
    facts.seconds += num_samples / rate_hz
    num_frames = sum(index.span(row, frame_member(number)) is not None for number in range(len(index.members)))
    if metadata.frame_times and len(metadata.frame_times) != num_frames:
        raise BadSampleError(f"{num_frames} frames, not {len(metadata.frame_times)}")
    if decode:
        _decode(reader, row, key, metadata, rate_hz, num_samples, num_frames)


def _audio_size(flac: bytes) -> tuple[int, int]:
    """(sample rate in Hz, samples) by the header."""
    try:
        with soundfile.SoundFile(io.BytesIO(flac)) as file:
            return int(file.samplerate), int(file.frames)
    except soundfile.LibsndfileError as error:
        raise BadSampleError(f"audio does not decode ({error})") from None


def _decode(
    reader: ShardReader, row: int, key: str, metadata: ClipMetadata, rate_hz: int, num_samples: int, num_frames: int
) -> None:
    config = DecodeConfig(
        sample_rate_hz=metadata.sample_rate or rate_hz,
        clip_seconds=num_samples / (metadata.sample_rate or rate_hz),
        audio=True,
        frames="all",
        num_frames=num_frames,
        frame_pixels=FRAME_PIXELS,
        random=False,
    )
    clip = decode_clip(reader, key, Slot(shard=0, row=row), config, seed=0, epoch=0)
    if clip.num_valid_samples != num_samples:
        raise BadSampleError(f"audio ends after {clip.num_valid_samples} of {num_samples} samples")
    if metadata.duration and abs(metadata.duration * rate_hz - num_samples) > 1:
        raise BadSampleError(f"audio has {num_samples / rate_hz:g} s, its json says {metadata.duration:g} s")
