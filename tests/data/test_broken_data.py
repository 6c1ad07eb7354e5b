"""Broken samples: noticed, replaced by the plan's next, counted by kind, named once; too many end the run."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import tarfile
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from audiotext_dist.data.bad_samples import BadKind, BadSample, BadSampleCount, BadSampleError
from audiotext_dist.data.batch import Batch
from audiotext_dist.data.decode import DecodeConfig, decode_clip, decode_metadata, square_frame
from audiotext_dist.data.index import index_path
from audiotext_dist.data.loader import TrainingBatches
from audiotext_dist.data.plan import Slot
from audiotext_dist.data.scan import scan_tar
from audiotext_dist.data.sets import DataConfig, SetConfig, make_plan, open_sets
from audiotext_dist.data.shard import Shard, load_shards
from audiotext_dist.data.shard_reader import ShardReader
from audiotext_dist.data.workers import iterate
from audiotext_dist.distributed import World
from audiotext_dist.errors import UserError
from tests.clips import FRAME_PIXELS, SAMPLE_RATE_HZ, make_sample, write_shards
from tests.media_files import noise
from tests.ranks import run_on_ranks

CPU = torch.device("cpu")
BAD = "clip-0011"  # of shard 1
GOOD = make_sample(0)
THREE_HOURS = 3 * 3600 * SAMPLE_RATE_HZ


WHOLE_CLIP = DecodeConfig(
    sample_rate_hz=SAMPLE_RATE_HZ,
    clip_seconds=1.0,
    audio=True,
    frames="none",
    num_frames=1,
    frame_pixels=8,
    random=False,
)


def flac(num_samples: int, sample_rate_hz: int = SAMPLE_RATE_HZ) -> bytes:
    content = io.BytesIO()
    with soundfile.SoundFile(content, "w", sample_rate_hz, 1, "PCM_16", format="FLAC") as file:
        for start in range(0, num_samples, 1 << 22):
            file.write(np.zeros(min(1 << 22, num_samples - start), np.int16))
    return content.getvalue()


def says(num_samples: int) -> bytes:
    """A second of sound whose header says another length: the last 36 bits before the MD5 of STREAMINFO."""
    content = bytearray(GOOD.flac)
    content[21] = content[21] & 0xF0 | num_samples >> 32
    content[22:26] = (num_samples & 0xFFFFFFFF).to_bytes(4, "big")
    return bytes(content)


def jpeg_says(pixels: int) -> bytes:
    content = bytearray(GOOD.frames[0])
    at = content.index(b"\xff\xc0") + 5
    content[at : at + 4] = pixels.to_bytes(2, "big") * 2
    return bytes(content)


def flipped(content: bytes, at: int = -20) -> bytes:
    changed = bytearray(content)
    changed[at] ^= 1
    return bytes(changed)


EMPTY_WAV = b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x40\x1f\0\0\x80\x3e\0\0\2\0\x10\0data\0\0\0\0"
# What stands in the tar instead of a clip's member; None: nothing.
BROKEN: dict[str, tuple[BadKind, str, bytes | None]] = {
    "no sound": ("missing_member", "flac", None),
    "no frame": ("missing_member", "2.jpg", None),
    "no json": ("missing_member", "json", None),
    "flac of no bytes": ("broken_audio", "flac", b""),
    "no flac": ("broken_audio", "flac", b"no flac" * 99),
    "flac cut short": ("broken_audio", "flac", GOOD.flac[:-900]),
    "flac with another bit": ("broken_audio", "flac", flipped(GOOD.flac)),
    "flac without sound": ("broken_audio", "flac", flac(0)),
    "wav without sound": ("broken_audio", "flac", EMPTY_WAV),
    "flac that claims hours": ("too_large", "flac", says(THREE_HOURS)),
    "flac that claims a minute": ("broken_audio", "flac", says(60 * SAMPLE_RATE_HZ)),
    "flac that says no length": ("too_large", "flac", says(0)),
    "three hours": ("too_large", "flac", flac(THREE_HOURS)),
    "another sample rate": ("sample_rate", "flac", flac(1000, 16000)),
    "no jpeg": ("broken_frame", "2.jpg", b"no jpeg" * 99),
    "jpeg of no bytes": ("broken_frame", "2.jpg", b""),
    "jpeg cut short": ("broken_frame", "2.jpg", GOOD.frames[0][:-30]),
    "jpeg of 30,000 x 30,000": ("too_large", "2.jpg", jpeg_says(30_000)),
    "no json in it": ("broken_json", "json", b"{"),
    "json of no bytes": ("broken_json", "json", b""),
    "json of another kind": ("broken_json", "json", b"[1]"),
    "json nested without end": ("broken_json", "json", b"[" * 200_000),
    "json with half a character": ("broken_json", "json", b'{"text": ["\\ud83d"]}'),
    "json not in utf-8": ("broken_json", "json", b'{"text": ["\xff"]}'),
    "json with a number for a caption": ("broken_json", "json", b'{"text": 3}'),
}


def write_set(folder: Path, changes: dict[str, bytes | None] | None = None, num_shards: int = 4) -> str:
    """Shards of 8 clips, indexed as they are; ``changes``: members of the bad clip."""
    for shard in range(num_shards):
        samples = [make_sample(8 * shard + row) for row in range(8)]
        path = folder / f"{shard:05d}.tar"
        with tarfile.open(path, "w") as tar:
            for sample in samples:
                members = sample.members() | (changes or {} if sample.key == BAD else {})
                for name, content in members.items():
                    if content is not None:
                        entry = tarfile.TarInfo(f"{sample.key}.{name}")
                        entry.size = len(content)
                        tar.addfile(entry, io.BytesIO(content))
        Path(index_path(str(path))).write_bytes(scan_tar(path, path.name).to_json())
    return str(folder)


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def batches_of(shards: str, world: World | None = None, batch_size: int = 8, **changes) -> TrainingBatches:
    settings = {"sample_rate_hz": SAMPLE_RATE_HZ, "clip_seconds": 0.5, "num_lanes": 4}
    data = DataConfig(train={"own": SetConfig(shards=shards)}, **{**settings, **changes})
    world = world or World()
    sets = open_sets(data.train, data, frames=True, captions=True)
    decode = data.decode_config(frames="all", frame_pixels=FRAME_PIXELS, random=True)
    plan_of = partial(_plan, sets, data, batch_size, world.size)
    return TrainingBatches(sets, plan_of, decode, seed=1, world=world, tokenize=None)


def _plan(sets, data, batch_size, world_size, epoch):
    return make_plan(sets, data, seed=1, epoch=epoch, global_batch_size=batch_size, world_size=world_size)


def read(batches: TrainingBatches, num_workers: int = 0, num_batches: int = 4) -> list[Batch]:
    return list(iterate(batches, range(num_batches), num_workers=num_workers, device=CPU))


def bad_in(batches: list[Batch]) -> list[BadSample]:
    return [bad for batch in batches for bad in batch.bad_samples]


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_replaced_alike_on_any_number_of_ranks(tmp_path: Path, name: str) -> None:
    kind, member, content = BROKEN[name]
    shards = write_set(tmp_path, {member: content})
    alone = read(batches_of(shards))
    (bad,) = bad_in(alone)
    assert (Path(bad.shard).name, bad.key, bad.kind) == ("00001.tar", BAD, kind)
    assert bad.reason
    assert "\n" not in bad.reason
    assert all(len(batch.keys) == 8 and BAD not in batch.keys for batch in alone)
    assert {key for batch in alone for key in batch.keys} == {f"clip-{n:04d}" for n in range(32)} - {BAD}
    ranks = [read(batches_of(shards, World(rank=rank, size=2))) for rank in range(2)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert whole.keys == [key for part in parts for key in part.keys]


def test_a_batch_is_filled_by_workers_too(tmp_path: Path) -> None:
    shards = write_set(tmp_path, {"json": b"{"})
    alone, in_workers = read(batches_of(shards)), read(batches_of(shards), num_workers=2)
    assert [batch.keys for batch in in_workers] == [batch.keys for batch in alone]
    assert bad_in(in_workers) == bad_in(alone) != []


def test_an_epoch_of_one_batch_takes_its_replacement_from_the_next(tmp_path: Path) -> None:
    shards = write_set(tmp_path, {"flac": None})
    for batch in read(batches_of(shards, batch_size=32), num_batches=3):
        assert len(batch.keys) == 32
        assert BAD not in batch.keys
        assert {bad.key for bad in batch.bad_samples} == {BAD}


@pytest.mark.parametrize("member", ["json", "0.jpg"])
@settings(deadline=None, max_examples=40)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, member: str, place: float, bit: int
) -> None:
    folder = tmp_path_factory.mktemp("flipped")
    (shard,) = load_shards(write_set(folder, num_shards=1))
    offset, num_bytes = shard.index.span(5, member) or (0, 0)
    at = offset + int(place * num_bytes)
    path = Path(shard.path)
    overwrite(path, at, bytes([path.read_bytes()[at] ^ 1 << bit]))
    with closing(ShardReader([shard])) as reader:
        with pytest.raises(BadSampleError, match=f"{member} has changed") as caught:
            reader.read(0, 5, member)
        assert caught.value.kind == "wrong_checksum"
        reader.read(0, 4, member)


@settings(deadline=None, max_examples=100)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), in_header=st.booleans())
def test_any_flipped_bit_of_a_sound_is_noticed(noise_shard: Shard, place: float, bit: int, in_header: bool) -> None:
    offset, num_bytes = noise_shard.index.span(1, "flac") or (0, 0)
    at = offset + int(place * (200 if in_header else num_bytes))
    path = Path(noise_shard.path)
    whole = path.read_bytes()
    with closing(ShardReader([noise_shard])) as reader:
        overwrite(path, at, bytes([whole[at] ^ 1 << bit]))
        with pytest.raises(BadSampleError) as caught:
            decode_clip(reader, "k", Slot(shard=0, row=1), WHOLE_CLIP, seed=0, epoch=0)
        overwrite(path, at, whole[at : at + 1])
        assert caught.value.kind in ("wrong_checksum", "broken_audio")
        decode_clip(reader, "k", Slot(shard=0, row=1), WHOLE_CLIP, seed=0, epoch=0)


@pytest.fixture(scope="module")
def noise_shard(tmp_path_factory: pytest.TempPathFactory) -> Shard:
    """Two clips of noise, whose FLAC is far longer than its header."""
    sound = io.BytesIO()
    soundfile.write(sound, noise(SAMPLE_RATE_HZ), SAMPLE_RATE_HZ, format="FLAC")
    clips = [dataclasses.replace(make_sample(number), flac=sound.getvalue()) for number in range(2)]
    (shard,) = load_shards(write_shards(tmp_path_factory.mktemp("noise"), [clips]))
    Path(shard.path).chmod(0o644)
    return shard


class _Members:
    """Stands for a reader: one clip with these members."""

    def __init__(self, members: dict[str, bytes]) -> None:
        self._members = members

    def read(self, shard: int, row: int, member: str) -> bytes:
        return self._members[member]

    def sha256(self, shard: int) -> str:
        return "0" * 64


@settings(deadline=None, max_examples=300)
@given(
    member=st.sampled_from(["flac", "json", "0.jpg"]),
    start=st.floats(0, 1),
    removed=st.sampled_from([0, 0, 1, 30, 5000]),
    inserted=st.binary(max_size=40),
)
def test_whatever_the_bytes_a_clip_decodes_or_is_a_bad_sample(
    member: str, start: float, removed: int, inserted: bytes
) -> None:
    members = GOOD.members()
    at = int(start * len(members[member]))
    members[member] = members[member][:at] + inserted + members[member][at + removed :]
    config = dataclasses.replace(WHOLE_CLIP, clip_seconds=0.5, frames="random", random=True)
    try:
        clip = decode_clip(_Members(members), "k", Slot(shard=0, row=0), config, seed=0, epoch=0)  # type: ignore[arg-type]
    except BadSampleError:
        return
    assert clip.waveform.shape == (SAMPLE_RATE_HZ // 2,)
    assert clip.frames.shape == (1, 8, 8, 3)


@given(st.binary(max_size=200))
def test_whatever_the_bytes_json_and_jpegs_are_read_or_refused(content: bytes) -> None:
    for decode in (partial(decode_metadata, key="k"), partial(square_frame, pixels=8)):
        with pytest.raises(BadSampleError):
            decode(content)


@pytest.mark.parametrize("inside", ["header", "member"])
@pytest.mark.parametrize("indexed", [True, False])
def test_a_tar_cut_short_is_refused_by_name(tmp_path: Path, inside: str, indexed: bool) -> None:
    shards = write_set(tmp_path)
    offset, _ = load_shards(shards)[2].index.span(6, "flac") or (0, 0)
    os.truncate(tmp_path / "00002.tar", offset + (-300 if inside == "header" else 700))
    if not indexed:
        (tmp_path / "00002.index.json").unlink()
    with pytest.raises(UserError, match=r"00002\.tar .*build or copy .* again"):
        batches_of(shards)


def test_a_tar_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    shards = load_shards(write_set(tmp_path, num_shards=1))
    offset, _ = shards[0].index.span(6, "flac") or (0, 0)
    with closing(ShardReader(shards)) as reader:
        reader.read(0, 7, "flac")
        os.truncate(shards[0].path, offset + 700)
        for row in (6, 7):
            with pytest.raises(BadSampleError) as caught:
                reader.read(0, row, "flac")
            assert caught.value.kind == "cut_short"
        reader.read(0, 5, "flac")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_grew_is_refused_when_it_is_opened(tmp_path: Path, num_workers: int) -> None:
    batches = batches_of(write_set(tmp_path))
    with (tmp_path / "00001.tar").open("ab") as file:
        file.write(b"\0" * 512)
    with pytest.raises(UserError, match=r"00001\.tar has .* where its index says"):
        read(batches, num_workers)


def test_a_changed_shard_is_refused_where_all_of_it_is_verified(tmp_path: Path) -> None:
    shards = write_set(tmp_path)
    assert len(read(batches_of(shards, verify="sha256"))) == 4
    offset, num_bytes = load_shards(shards)[1].index.span(3, "flac") or (0, 0)
    overwrite(tmp_path / "00001.tar", offset + num_bytes // 2, b"\xff\xff\xff")
    with pytest.raises(UserError, match=r"00001\.tar has changed since its index was made"):
        read(batches_of(shards, verify="sha256"))
    (bad,) = bad_in(read(batches_of(shards, verify="size")))
    assert (bad.key, bad.kind) == (BAD, "wrong_checksum")


@pytest.mark.parametrize("member", ["json", "flac", "3.jpg"])
@pytest.mark.parametrize("content", [None, b""])
def test_the_first_clip_says_nothing_of_the_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, member: str, content: bytes | None
) -> None:
    monkeypatch.setattr(f"{__name__}.BAD", "clip-0000")
    (bad,) = bad_in(read(batches_of(write_set(tmp_path, {member: content}))))
    assert bad.key == "clip-0000"


def test_a_set_without_any_json_that_can_be_read_is_named(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [[make_sample(0)]])
    offset, num_bytes = load_shards(shards)[0].index.span(0, "json") or (0, 0)
    (tmp_path / "00000.tar").chmod(0o644)
    overwrite(tmp_path / "00000.tar", offset, b"x" * num_bytes)
    index = json.loads((tmp_path / "00000.index.json").read_bytes())
    older = {key: value for key, value in index.items() if key not in ("num_captioned", "sample_rate_hz")}
    (tmp_path / "00000.index.json").write_text(json.dumps(older))
    with pytest.raises(UserError, match=r"data set 'own': no json of .*00000\.tar can be read"):
        batches_of(shards)


def bad_sample(key: str, kind: BadKind = "broken_audio") -> BadSample:
    return BadSample(shard="s.tar", key=key, kind=kind, reason="why")


def test_bad_samples_are_counted_by_kind_and_named_once(caplog: pytest.LogCaptureFixture) -> None:
    count = BadSampleCount(0.5, World())
    assert count.check() == {"bad_samples": 0}
    count.add(8, [bad_sample("a"), bad_sample("b", "too_large")])
    assert count.check() == {"bad_samples": 2, "bad_samples/broken_audio": 1, "bad_samples/too_large": 1}
    count.add(8, [bad_sample("a")])
    assert count.check()["bad_samples/broken_audio"] == 2
    assert caplog.messages == ["replaced a of s.tar: why", "replaced b of s.tar: why"]


@pytest.mark.parametrize(
    ("max_share", "num_used", "num_bad", "stops"),
    [
        (0.01, 0, 10, False),  # ten are borne at any time,
        (0.01, 22, 11, True),  # more only within the share
        (0.01, 10_000, 100, False),
        (0.01, 9_800, 100, True),
        (0.0, 10_000, 1, True),
        (0.0, 10_000, 0, False),
        (1.0, 0, 500, False),
    ],
)
def test_too_many_bad_samples_end_the_run(max_share: float, num_used: int, num_bad: int, stops: bool) -> None:
    count = BadSampleCount(max_share, World())
    count.add(num_used, [bad_sample(str(number)) for number in range(num_bad)])
    if stops:
        with pytest.raises(UserError, match=rf"{num_bad} of .*max_bad_share={max_share} \({num_bad} broken_audio\)"):
            count.check()
    else:
        assert count.check()["bad_samples"] == num_bad


def _count_on_rank(rank: int) -> tuple[dict[str, int], list[str], str]:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("audiotext_dist").addHandler(handler)
    count = BadSampleCount(0.1, World(rank=rank, size=2))
    count.add(40, [bad_sample("a")] if rank else [])
    count.check()
    # The next epoch's order may give the same clip to another rank.
    count.add(40, [] if rank else [bad_sample("a")])
    counts = count.check()
    count.add(0, [bad_sample(str(number)) for number in range(99)] if rank else [])
    try:
        count.check()
        error = ""
    except UserError as found:
        error = str(found)
    return counts, [record.getMessage() for record in records if "replaced a " in record.getMessage()], error


def test_ranks_count_together_and_stop_together() -> None:
    (counts, named, error), (counts_1, named_1, error_1) = run_on_ranks(_count_on_rank, 2)
    assert counts == counts_1 == {"bad_samples": 2, "bad_samples/broken_audio": 2}
    assert len(named) == 1
    assert not named_1
    assert error == error_1
    assert "101 of 261 samples could not be used" in error
