"""``python -m shards.index``: tars made elsewhere become a listed set."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from audiotext_dist.data.shard import load_shards
from audiotext_dist.data.shard_list import LIST_NAME
from audiotext_dist.errors import UserError
from shards.index import IndexConfig, index_folder, main
from tests.clips import make_sample, write_shards


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """Three tars, of which one has an index."""
    write_shards(tmp_path, [[make_sample(4 * shard + row, num_frames=0) for row in range(4)] for shard in range(3)])
    for number in (0, 2):
        (tmp_path / f"0000{number}.index.json").unlink()
    return tmp_path


def test_tars_made_elsewhere_are_indexed_and_listed_once(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scanned = [shard.index.to_json() for shard in load_shards(str(elsewhere))]
    monkeypatch.setattr(sys, "argv", ["index.py", f"shards={elsewhere}", "num_workers=1"])
    main()
    assert capsys.readouterr().out == f"{elsewhere}/{LIST_NAME}: 3 shards, 2 of them scanned now\n"
    monkeypatch.setattr("audiotext_dist.data.shard.scan_tar", lambda *_: pytest.fail("scanned again"))
    listed = load_shards(str(elsewhere))
    assert all(shard.opened is None for shard in listed)
    assert [shard.index.to_json() for shard in listed] == scanned
    assert index_folder(IndexConfig(shards=str(elsewhere), num_workers=1)) == (0, 3)


def test_what_cannot_be_listed_is_told_and_leaves_no_list(elsewhere: Path) -> None:
    config = IndexConfig(shards=f"{elsewhere}/", num_workers=1)
    index_folder(config)
    (elsewhere / "00001.tar").rename(elsewhere / "away")
    with pytest.raises(UserError, match=r"has no 00001\.tar, only its index"):
        index_folder(config)
    assert not (elsewhere / LIST_NAME).exists()
    (elsewhere / "00001.tar").write_bytes((elsewhere / "away").read_bytes()[:-2000])
    (elsewhere / "00001.index.json").unlink()
    with pytest.raises(UserError, match=r"00001\.tar is cut short"):
        index_folder(config)
    (elsewhere / "build.json").write_text("{}")
    with pytest.raises(UserError, match=r"00001\.tar is not finished"):
        index_folder(config)


@pytest.mark.parametrize("shards", ["set/*.tar", "set/{0..3}.tar", "set/0.tar", "{a,b}"])
def test_a_part_of_a_folder_cannot_be_listed(shards: str) -> None:
    with pytest.raises(UserError, match="must be one folder"):
        IndexConfig(shards=shards)
