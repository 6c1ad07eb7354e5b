from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import webdataset

from audiotext_dist.data.index import ShardIndex
from audiotext_dist.data.sample import MAX_KEY_LENGTH, ClipMetadata, Sample
from audiotext_dist.data.shard import load_shards
from shards.writer import commit, shard_name, write_tar


def samples(num_samples: int = 5, num_frames: int = 2) -> Iterator[Sample]:
    for number in range(num_samples):
        yield Sample(
            key=f"-clip_{number}",
            metadata=ClipMetadata(
                text=[f"höre {number}"], recording=f"r:{number // 2}", dataset="d", duration=1.0, sample_rate=8000
            ),
            flac=b"fLaC" + bytes([number]) * (300 * number + 1),
            frames=[b"\xff\xd8" + bytes([number, frame]) * 40 for frame in range(num_frames)],
        )


def test_stock_webdataset_reads_the_shard(tmp_path: Path) -> None:
    write_tar(str(tmp_path), "00000.tar", samples())
    found = list(webdataset.WebDataset(str(tmp_path / "00000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in found] == [sample.key for sample in samples()]
    for sample, expected in zip(found, samples(), strict=True):
        assert {member: sample[member] for member in expected.members()} == expected.members()


def test_the_index_points_at_what_tarfile_reads(tmp_path: Path) -> None:
    index = write_tar(str(tmp_path), "00000.tar", samples())
    assert index is not None
    commit(str(tmp_path), index)
    (shard,) = load_shards(str(tmp_path))
    assert shard.index.recordings == ["r:0", "r:0", "r:1", "r:1", "r:2"]
    content = (tmp_path / "00000.tar").read_bytes()
    with tarfile.open(tmp_path / "00000.tar") as tar:
        for row, key in enumerate(shard.index.keys):
            for member in ("flac", "json", "0.jpg", "1.jpg"):
                span = shard.index.span(row, member)
                file = tar.extractfile(f"{key}.{member}")
                assert span is not None
                assert file is not None
                assert content[span[0] : span[0] + span[1]] == file.read()


def test_equal_samples_give_equal_bytes_that_name_no_person_or_time(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write_tar(str(tmp_path / folder), "00000.tar", samples())
    assert (tmp_path / "one/00000.tar").read_bytes() == (tmp_path / "two/00000.tar").read_bytes()
    with tarfile.open(tmp_path / "one/00000.tar") as tar:
        facts = {(entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname, entry.mode) for entry in tar}
    assert facts == {(0, 0, 0, "", "", 0o444)}


def test_the_longest_key_fits(tmp_path: Path) -> None:
    (sample,) = samples(1)
    longest = Sample(key="k" * MAX_KEY_LENGTH, metadata=sample.metadata, flac=sample.flac)
    index = write_tar(str(tmp_path), "00000.tar", iter([longest]))
    assert index is not None
    assert index.keys == [longest.key]
    (found,) = webdataset.WebDataset(str(tmp_path / "00000.tar"), shardshuffle=False)
    assert found["__key__"] == longest.key


def test_no_samples_write_nothing(tmp_path: Path) -> None:
    assert write_tar(str(tmp_path), "00000.tar", iter([])) is None
    assert list(tmp_path.iterdir()) == []


def test_a_failure_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> Iterator[Sample]:
        yield from samples(2)
        raise MemoryError

    with pytest.raises(MemoryError):
        write_tar(str(tmp_path), "00000.tar", failing())
    assert list(tmp_path.iterdir()) == []


def test_a_remote_shard_is_uploaded_whole() -> None:
    out = "memory://shards-of-test-writer"
    index = write_tar(out, shard_name(7), samples())
    assert index is not None
    commit(out, index)
    filesystem = fsspec.filesystem("memory")
    content = filesystem.cat_file("/shards-of-test-writer/00007.tar")
    assert len(content) == index.shard_bytes
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert tar.getnames()[0] == "-clip_0.0.jpg"
    stored = ShardIndex.from_json(filesystem.cat_file("/shards-of-test-writer/00007.index.json"), "index")
    assert stored.keys == index.keys
    assert stored.sha256 == index.sha256
