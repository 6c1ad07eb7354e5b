"""Sets with a list of their shards: opened without their indexes, and refused where the list is not theirs."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest

from audiotext_dist import storage
from audiotext_dist.data.decode import DecodeConfig
from audiotext_dist.data.index import index_path
from audiotext_dist.data.loader import EvaluationBatches
from audiotext_dist.data.sets import DataConfig, SetConfig, open_sets
from audiotext_dist.data.shard import _listed_index, load_shards
from audiotext_dist.data.shard_list import LIST_NAME, write_list
from audiotext_dist.data.shard_reader import ShardReader
from audiotext_dist.distributed import World
from audiotext_dist.errors import UserError
from shards.finished import list_rows
from tests.clips import SAMPLE_RATE_HZ, make_sample, write_shards

NUM_SHARDS = 3


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """Three shards of 1, 2 and 3 clips, and their list."""
    write_shards(tmp_path, [[make_sample(10 * shard + row) for row in range(shard + 1)] for shard in range(NUM_SHARDS)])
    write_list(str(tmp_path), list_rows(str(tmp_path)))
    return tmp_path


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the indexes that were read since."""
    names: list[str] = []
    read_bytes = storage.read_bytes

    def counted(path: str, *rest: object) -> bytes:
        if path.endswith(".index.json"):
            names.append(Path(path).name)
        return read_bytes(path, *rest)

    monkeypatch.setattr("audiotext_dist.storage.read_bytes", counted)
    return names


def test_a_listed_set_is_that_of_its_indexes_but_opens_none(listed: Path, opened: list[str]) -> None:
    shards = load_shards(str(listed))
    assert opened == []
    (listed / LIST_NAME).unlink()
    for ours, theirs in zip(shards, load_shards(str(listed)), strict=True):
        assert (ours.path, ours.num_samples, ours.num_bytes, ours.sha256) == (
            theirs.path,
            theirs.num_samples,
            theirs.num_bytes,
            theirs.sha256,
        )
        assert (ours.members, ours.num_captioned, ours.sample_rate_hz) == (
            theirs.members,
            theirs.num_captioned,
            theirs.sample_rate_hz,
        )
        assert ours.index.to_json() == theirs.index.to_json()


def test_an_index_is_opened_when_its_shard_is_read(listed: Path, opened: list[str]) -> None:
    reader = ShardReader(load_shards(str(listed)))
    for row in (0, 1, 0):
        reader.read(1, row, "json")
    assert opened == ["00001.index.json"]


def test_no_more_indexes_stay_open_than_the_limit(
    listed: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("audiotext_dist.data.shard._listed_index", lru_cache(maxsize=2)(_listed_index.__wrapped__))
    first, second, third = load_shards(str(listed))
    for shard in (first, second, first, third, first, second):
        assert shard.index.shard_name == Path(shard.path).name
    assert [name[:5] for name in opened] == ["00000", "00001", "00002", "00001"]


def test_training_of_a_listed_set_is_checked_without_its_indexes(listed: Path, opened: list[str]) -> None:
    data = DataConfig(sample_rate_hz=SAMPLE_RATE_HZ, clip_seconds=1.0)
    sets = {"own": SetConfig(shards=str(listed))}
    ((*_, last),) = open_sets(sets, data, frames=True, captions=True)
    assert opened == []
    assert last.num_samples == NUM_SHARDS


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (lambda: make_sample(7, num_frames=3), r"data set 'own' has no 3\.jpg in .*00001\.tar"),
        (lambda: make_sample(7, sample_rate_hz=4000), "data set 'own' was built at 4000 Hz"),
    ],
)
def test_any_shard_that_does_not_fit_is_an_error_before_training(
    tmp_path: Path, changed: Callable[[], object], said: str
) -> None:
    write_shards(tmp_path, [[make_sample(0)], [changed()], [make_sample(2)]])
    write_list(str(tmp_path), list_rows(str(tmp_path)))
    data = DataConfig(sample_rate_hz=SAMPLE_RATE_HZ)
    with pytest.raises(UserError, match=said):
        open_sets({"own": SetConfig(shards=str(tmp_path))}, data, frames=True, captions=True)


def test_a_set_without_captions_is_an_error_before_training(tmp_path: Path, opened: list[str]) -> None:
    write_shards(tmp_path, [[make_sample(0, captions=[])], [make_sample(1, captions=[])]])
    write_list(str(tmp_path), list_rows(str(tmp_path)))
    opened.clear()
    data = DataConfig(sample_rate_hz=SAMPLE_RATE_HZ)
    with pytest.raises(UserError, match="data set 'own' has no captions"):
        open_sets({"own": SetConfig(shards=str(tmp_path))}, data, frames=False, captions=True)
    assert opened == []


def _rebuild_the_second(folder: Path) -> None:
    write_shards(folder / "new", [[make_sample(99)]])
    index = json.loads((folder / "new" / "00000.index.json").read_bytes())
    (folder / "new" / "00000.tar").replace(folder / "00001.tar")
    (folder / "00001.index.json").write_text(json.dumps({**index, "shard": "00001.tar"}))


def _grow_the_second(folder: Path) -> None:
    (folder / "00001.tar").chmod(0o644)
    with (folder / "00001.tar").open("ab") as file:
        file.write(b"\0" * 512)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_rebuild_the_second, r"00001\.index\.json is not the index that shards\.parquet beside it lists"),
        (lambda folder: (folder / "00001.index.json").unlink(), r"00001\.index\.json is not there"),
        (_grow_the_second, r"00001\.tar has .* bytes where its index says"),
    ],
)
def test_a_shard_that_is_not_the_listed_one_is_refused_where_it_is_first_read(
    listed: Path, damage: Callable[[Path], None], said: str
) -> None:
    damage(listed)
    shards = load_shards(str(listed))
    decode = DecodeConfig(
        sample_rate_hz=SAMPLE_RATE_HZ,
        clip_seconds=1.0,
        audio=True,
        frames="none",
        num_frames=4,
        frame_pixels=16,
        random=False,
    )
    batches = EvaluationBatches(shards, decode, world=World(), batch_size=1)
    assert batches[0].keys == ["clip-0000"]
    with pytest.raises(UserError, match=said):
        batches[1]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not a list", None])
def test_what_is_no_list_is_refused(listed: Path, content: bytes | None) -> None:
    from shards.report import to_parquet, to_table

    (listed / LIST_NAME).write_bytes(to_parquet(to_table([])) if content is None else content)
    with pytest.raises(UserError, match=r"shards\.parquet is no list of shards"):
        load_shards(str(listed))


def test_a_shard_that_the_list_lacks_is_refused(listed: Path) -> None:
    (listed / "00002.tar").rename(listed / "00007.tar")
    Path(index_path(str(listed / "00002.tar"))).rename(listed / "00007.index.json")
    for spec in (f"{listed}", f"{listed}/*.tar", f"{listed}/{{00000,00007}}.tar"):
        with pytest.raises(UserError, match=r"has no 00007\.tar in its shards\.parquet"):
            load_shards(spec)


def test_a_listed_shard_that_is_gone_is_told_before_training(listed: Path) -> None:
    (listed / "00002.tar").unlink()
    for spec in (f"{listed}", f"{listed}/*.tar", f"{listed}/{{00000..00002}}.tar"):
        with pytest.raises(UserError, match=r"has no 00002\.tar, and shards\.parquet lists it"):
            load_shards(spec)
    assert len(load_shards(f"{listed}/{{00000,00001}}.tar")) == 2


def test_a_shard_that_goes_after_the_start_is_named_where_it_is_read(listed: Path) -> None:
    shards = load_shards(str(listed))
    assert shards[2].index.num_samples == NUM_SHARDS
    for name in ("00001.tar", "00002.tar"):
        (listed / name).unlink()
    reader = ShardReader(shards)
    with pytest.raises(UserError, match=r"00001\.tar is not there, only its index: copy the shard again"):
        reader.read(1, 0, "json")
    with pytest.raises(UserError, match=r"00002\.tar cannot be read \(No such file or directory\)"):
        reader.read(2, 0, "json")


def test_a_part_of_a_listed_set_may_be_named(listed: Path) -> None:
    def names(spec: str) -> list[str]:
        return [Path(shard.path).name for shard in load_shards(spec)]

    assert names(f"{listed}/") == names(f"file://{listed}") == ["00000.tar", "00001.tar", "00002.tar"]
    assert names(f"{listed}/{{00002,00000}}.tar") == ["00002.tar", "00000.tar"]
    assert names(f"{listed}/*1.tar::{listed}/00000.tar") == ["00001.tar", "00000.tar"]
    with pytest.raises(UserError, match=r"no x\*\.tar in the shards\.parquet"):
        names(f"{listed}/x*.tar")
