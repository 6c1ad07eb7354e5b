from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest

from audiotext_dist.data.bad_samples import BadSampleError
from audiotext_dist.data.index import ShardIndex, index_path
from audiotext_dist.data.scan import scan_tar
from audiotext_dist.data.shard import load_shards
from audiotext_dist.data.shard_reader import ShardReader
from audiotext_dist.errors import UserError

BLOCK = tarfile.BLOCKSIZE


def tar_of(members: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, member in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(member)
            tar.addfile(entry, io.BytesIO(member))
    return content.getvalue()


def clips(num_clips: int) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    for number in range(num_clips):
        members[f"c{number}.flac"] = bytes([1 + number]) * (600 + number)
        members[f"c{number}.json"] = json.dumps({"text": "a", "recording": f"r{number // 2}"}).encode()
        if number % 2:
            members[f"c{number}.0.jpg"] = b"j" * 512
    return members


def scan(tmp_path: Path, content: bytes) -> ShardIndex:
    path = tmp_path / "shard.tar"
    path.write_bytes(content)
    return scan_tar(path, "shard.tar")


def test_a_scan_finds_every_member_where_it_is(tmp_path: Path) -> None:
    members = clips(5)
    content = tar_of(members)
    index = scan(tmp_path, content)
    assert index.keys == ["c0", "c1", "c2", "c3", "c4"]
    assert index.recordings == ["r0", "r0", "r1", "r1", "r2"]
    assert index.shard_bytes == len(content)
    for row, key in enumerate(index.keys):
        for member in ("flac", "json", "0.jpg"):
            span = index.span(row, member)
            expected = members.get(f"{key}.{member}")
            assert (content[span[0] : sum(span)] if span else None) == expected


def test_a_stored_index_is_the_same_index(tmp_path: Path) -> None:
    index = scan(tmp_path, tar_of(clips(3)))
    again = ShardIndex.from_json(index.to_json(), "index")
    assert again.to_json() == index.to_json()
    np.testing.assert_array_equal(again.members["0.jpg"], index.members["0.jpg"])


def test_a_tar_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    # The last member fills its block, so that not even padding tells where it ends.
    content = tar_of(clips(2))
    end_of_members = len(content.rstrip(b"\0"))
    assert end_of_members % BLOCK == 0
    whole = scan(tmp_path, content)
    path = tmp_path / "shard.tar"
    for length in reversed(range(len(content))):
        os.truncate(path, length)
        # Two blocks of zeros end a tar; what some writers add to them holds nothing.
        if length >= end_of_members + 2 * BLOCK and length % BLOCK == 0:
            assert scan_tar(path, "shard.tar").keys == whole.keys
        else:
            with pytest.raises(UserError, match=r"shard\.tar"):
                scan_tar(path, "shard.tar")


@pytest.mark.parametrize("member", range(3))
def test_a_damaged_header_is_refused(tmp_path: Path, member: int) -> None:
    content = bytearray(tar_of(clips(3)))
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        offset = tar.getmembers()[member].offset
    content[offset + 3] ^= 0xFF
    with pytest.raises(UserError, match=r"shard\.tar"):
        scan(tmp_path, bytes(content))


def test_two_tars_in_one_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="damaged"):
        scan(tmp_path, tar_of(clips(1)) + tar_of(clips(2)))


def test_a_member_that_comes_twice_is_refused(tmp_path: Path) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("a.flac"))
        tar.addfile(tarfile.TarInfo("a.flac"))
    with pytest.raises(UserError, match=r"'a\.flac' twice"):
        scan(tmp_path, content.getvalue())


def test_a_member_that_is_too_large_to_be_read_is_not_read_to_be_scanned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("scan", "shard_reader"):
        monkeypatch.setattr(f"audiotext_dist.data.{module}.MAX_MEMBER_BYTES", 1000)
    small, large = b'{"text": "a"}', b" " * 1001
    (tmp_path / "a.tar").write_bytes(tar_of({"a.json": small, "b.json": large}))
    (shard,) = load_shards(str(tmp_path / "a.tar"))
    entries = [shard.index.entry(row, "json") for row in range(2)]
    assert [entry and entry[1:] for entry in entries] == [(len(small), crc32(small)), (len(large), 0)]
    with contextlib.closing(ShardReader([shard])) as reader:
        assert reader.read(0, 0, "json") == small
        with pytest.raises(BadSampleError, match="json has 1001 bytes, more than 1000"):
            reader.read(0, 1, "json")


@pytest.mark.parametrize("content", [b"", b"not a tar", b"\0" * 100, b"x" * 20480])
def test_what_is_no_tar_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UserError, match=r"shard\.tar"):
        scan(tmp_path, content)


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"version": 99}', b"\xff"])
def test_what_is_no_index_is_refused(content: bytes) -> None:
    with pytest.raises(UserError, match=r"00000\.index\.json"):
        ShardIndex.from_json(content, "00000.index.json")


def test_a_folder_is_loaded_in_order_with_or_without_indexes(tmp_path: Path) -> None:
    for number in range(3):
        path = tmp_path / f"0000{number}.tar"
        path.write_bytes(tar_of(clips(number + 1)))
        if number != 1:
            Path(index_path(str(path))).write_bytes(scan_tar(path, path.name).to_json())
    shards = load_shards(str(tmp_path))
    assert [shard.index.num_samples for shard in shards] == [1, 2, 3]
    assert [shard.index.shard_name for shard in shards] == ["00000.tar", "00001.tar", "00002.tar"]
