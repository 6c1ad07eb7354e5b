"""Shards on S3 and web servers in trouble give the batches of the local disk; fetched ahead, nothing waits."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
import torch

from audiotext_dist import storage
from audiotext_dist.data.batch import Batch
from audiotext_dist.data.cache import NodeCache
from audiotext_dist.data.loader import EvaluationBatches, TrainingBatches
from audiotext_dist.data.plan import Plan
from audiotext_dist.data.prefetch import Prefetcher, RemoteFile
from audiotext_dist.data.read_counts import ReadCounts
from audiotext_dist.data.sets import DataConfig, SetConfig, make_plan, warn_of_small_cache
from audiotext_dist.data.shard import Shard, _listed_index, load_shards
from audiotext_dist.data.shard_list import LIST_NAME, write_list
from audiotext_dist.data.shard_reader import ShardReader, Verify
from audiotext_dist.data.workers import in_step, iterate
from audiotext_dist.distributed import World, sums_over_ranks
from audiotext_dist.errors import UserError
from audiotext_dist.retry import RetryConfig
from shards.finished import list_rows
from tests.clips import SAMPLE_RATE_HZ, make_sample, write_shards
from tests.object_store import Fault, Request, proxy, server, use
from tests.ranks import run_on_ranks
from tests.web import web_server

CPU = torch.device("cpu")
NUM_SHARDS, ROWS = 12, 4
HASTY = RetryConfig(retries=3, stall_seconds=0.5, first_pause_seconds=0.01)
DATA = DataConfig(
    train={"own": SetConfig(shards="elsewhere")},
    sample_rate_hz=SAMPLE_RATE_HZ,
    clip_seconds=0.1,
    num_lanes=2,
    window_shards=2,
)
DECODE = DATA.decode_config(frames="none", frame_pixels=0, random=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    samples = [
        [make_sample(ROWS * shard + row, num_frames=0, seconds=0.2) for row in range(ROWS)]
        for shard in range(NUM_SHARDS)
    ]
    return Path(write_shards(tmp_path_factory.mktemp("site") / "set", samples))


@pytest.fixture(scope="module")
def site(folder: Path) -> Iterator[str]:
    with web_server(folder.parent) as address:
        yield address


@pytest.fixture(scope="module")
def store(folder: Path) -> Iterator[str]:
    with server() as endpoint, pytest.MonkeyPatch.context() as patch:
        use(patch, endpoint)
        s3 = fsspec.filesystem("s3")
        s3.mkdir("bucket")
        s3.put(f"{folder}/", "bucket/set/", recursive=True)
        yield endpoint


@pytest.fixture
def cache(tmp_path: Path) -> NodeCache:
    return NodeCache(folder=str(tmp_path / "cache"), retry=HASTY)


def plan_of(sets: list[list[Shard]], world_size: int) -> Callable[[int], Plan]:
    return lambda epoch: make_plan(sets, DATA, seed=1, epoch=epoch, global_batch_size=4, world_size=world_size)


def training(spec: str, cache: NodeCache, world: World | None = None) -> TrainingBatches:
    sets, world = [load_shards(spec, cache)], world or World()
    return TrainingBatches(sets, plan_of(sets, world.size), DECODE, seed=1, world=world, tokenize=None, cache=cache)


def two_epochs(spec: str, cache: NodeCache, num_workers: int = 0) -> list[Batch]:
    steps = range(2 * NUM_SHARDS * ROWS // 4)
    return list(iterate(training(spec, cache), steps, num_workers=num_workers, device=CPU))


def assert_equal(found: list[Batch], expected: list[Batch]) -> None:
    assert [batch.keys for batch in found] == [batch.keys for batch in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.captions == other.captions
        assert torch.equal(one.waveform_BS, other.waveform_BS)
        assert one.bad_samples == other.bad_samples == []


def shards_in(cache: NodeCache) -> list[Path]:
    return sorted(Path(cache.folder).glob("*.tar"))


def test_batches_from_s3_in_every_trouble_are_those_of_the_disk(
    folder: Path, store: str, cache: NodeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    troubles: list[Fault] = ["500", "503", "reset", "cut", "stall", "freeze"]
    met: Counter[str] = Counter()

    def trouble(request: Request) -> Fault | None:
        """The first answer for each object is bad, whether it is asked for its size or its content."""
        path = request.path.partition("?")[0]
        if request.number or not path.endswith((".tar", ".json")):
            return None
        fault = troubles[sum(path.encode()) % len(troubles)]
        if request.method == "HEAD" and fault in ("reset", "cut", "freeze"):
            fault = "503"  # there is no body
        met[fault] += 1
        return fault

    with proxy(store, trouble) as endpoint:
        use(monkeypatch, endpoint)
        patient = dataclasses.replace(cache, retry=dataclasses.replace(HASTY, stall_seconds=1.0))
        found = two_epochs("s3://bucket/set", patient, num_workers=2)
    assert met.keys() == set(troubles)
    assert_equal(found, two_epochs(str(folder), cache))
    assert len(shards_in(cache)) == NUM_SHARDS


def test_a_fetch_from_s3_goes_on_with_the_piece_that_failed(
    folder: Path, store: str, cache: NodeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (folder / "00003.tar").read_bytes()
    num_pieces, asked = 5, []

    def cut_the_fourth(request: Request) -> Fault | None:
        if request.method == "GET":
            asked.append(request.number)
        return "cut" if request.method == "GET" and request.number == 3 else None

    monkeypatch.setattr("audiotext_dist.storage.reading.BLOCK_BYTES", -(-len(content) // num_pieces))
    with proxy(store, cut_the_fourth) as endpoint:
        use(monkeypatch, endpoint)
        (shard,) = load_shards(str(folder / "00003.tar"))
        url = "s3://bucket/set/00003.tar"
        descriptor = cache.open(url, num_bytes=len(content), sha256=shard.index.sha256)
    assert os.pread(descriptor, len(content) + 1, 0) == content
    os.close(descriptor)
    assert len(asked) == num_pieces + 1


def test_batches_from_a_web_server_in_trouble_are_those_of_the_disk(folder: Path, site: str, cache: NodeCache) -> None:
    def trouble(request: Request) -> Fault | None:
        faults: list[Fault] = ["500", "503", "reset", "cut", "freeze"]
        return faults[sum(request.path.encode()) % 5] if request.number == 0 and "000" in request.path else None

    spec = "/set/{00000..00011}.tar"
    with proxy(site, trouble) as address:
        assert_equal(two_epochs(address + spec, cache), two_epochs(str(folder), cache))


def test_a_listed_set_is_found_where_a_server_lists_no_folder_and_its_indexes_come_with_its_shards(
    folder: Path, tmp_path: Path, cache: NodeCache
) -> None:
    listed = tmp_path / "web" / "set"
    shutil.copytree(folder, listed)
    (listed / "index.html").write_text("no files are listed here")
    write_list(str(listed), list_rows(str(listed)))
    met: list[str] = []

    def note(request: Request) -> None:
        if request.method == "GET":
            met.append(request.path.rpartition("/")[2].partition(".")[2])

    with web_server(listed.parent) as address, proxy(address, note) as counted:
        shards = load_shards(f"{counted}/set", cache)
        assert set(met) == {"parquet"}
        assert_equal(two_epochs(f"{counted}/set", cache), two_epochs(str(folder), cache))
        # Twice where a reader is there before its index: one may be under way ahead.
        assert NUM_SHARDS <= Counter(met)["index.json"] <= 2 * NUM_SHARDS
        (listed / "00001.index.json").unlink()
        _listed_index.cache_clear()
        with pytest.raises(UserError, match=r"00001\.index\.json is not there, and shards\.parquet beside it lists it"):
            ShardReader(shards, cache).read(1, 0, "json")


def test_a_shard_that_was_copied_into_a_bucket_and_not_listed_is_named(
    folder: Path, store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    patient = NodeCache(folder=str(tmp_path / "cache"))
    write_list(str(tmp_path), list_rows(str(folder))[:2])
    s3 = fsspec.filesystem("s3")
    for path in (tmp_path / LIST_NAME, *(folder / f"0000{number}.tar" for number in range(3))):
        s3.put(str(path), f"bucket/listed/{path.name}")

    def said(spec: str) -> list[str]:
        caplog.clear()
        load_shards(spec, patient)
        return [record.getMessage() for record in caplog.records if record.name.startswith("audiotext_dist")]

    assert said("s3://bucket/listed/{00000,00001}.tar") == said("s3://bucket/listed/*1.tar") == []
    (warning,) = said("s3://bucket/listed")
    assert warning.startswith("s3://bucket/listed has 00002.tar, which its shards.parquet lacks")


@pytest.mark.parametrize("verify", ["size", "sha256"])
def test_a_shard_that_was_built_anew_to_the_same_size_is_fetched_anew(
    tmp_path: Path, cache: NodeCache, verify: Verify
) -> None:
    store, sizes = fsspec.filesystem("memory"), set()
    for captions in (["a dog barks"], ["a cat meows loudly"]):
        built = Path(write_shards(tmp_path / captions[0], [[make_sample(0, num_frames=0, captions=captions)]]))
        sizes.add((built / "00000.tar").stat().st_size)
        for file in built.iterdir():
            store.pipe_file(f"/anew/{verify}/{file.name}", file.read_bytes())
        reader = ShardReader(load_shards(f"memory://anew/{verify}", cache), cache, verify=verify)
        assert json.loads(reader.read(0, 0, "json"))["text"] == captions
    assert len(sizes) == 1


def test_a_shard_that_is_damaged_in_the_cache_is_fetched_again_where_all_bytes_are_looked_at(
    site: str, folder: Path, cache: NodeCache
) -> None:
    shards = load_shards(f"{site}/set/00000.tar", cache)
    expected = ShardReader(shards, cache).read(0, 0, "flac")
    (held,) = shards_in(cache)
    held.write_bytes(bytes(held.stat().st_size))
    assert ShardReader(shards, cache, verify="sha256").read(0, 0, "flac") == expected
    assert held.read_bytes() == (folder / "00000.tar").read_bytes()


def test_a_cache_that_is_too_small_still_gives_every_batch(folder: Path, site: str, cache: NodeCache) -> None:
    tight = dataclasses.replace(cache, max_bytes=1)
    assert_equal(two_epochs(f"{site}/set", tight, num_workers=2), two_epochs(str(folder), cache))
    assert len(shards_in(tight)) <= 2  # the last one of each worker


def removed_but_open(cache: NodeCache) -> list[str]:
    """Files of the cache that still take up its disk."""
    targets = []
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            targets.append(str(path.readlink()))
    return [target for target in targets if target.startswith(cache.folder) and target.endswith("(deleted)")]


@pytest.mark.parametrize("held_shards", [NUM_SHARDS, 8])
def test_a_warmed_run_never_waits_across_the_epochs_end_too(site: str, cache: NodeCache, held_shards: int) -> None:
    shard_bytes = max(shard.index.shard_bytes for shard in load_shards(f"{site}/set", cache))
    # Two windows of two lanes, or the whole set.
    cache = dataclasses.replace(cache, max_bytes=held_shards * shard_bytes)
    batches = training(f"{site}/set", cache)
    batches[0]
    batches._prefetcher.wait_until_idle()
    total = ReadCounts()
    for step in range(1, 3 * NUM_SHARDS * ROWS // 4):
        total += batches[step].counts
        batches._prefetcher.wait_until_idle()
        assert sum(path.stat().st_size for path in shards_in(cache)) <= cache.max_bytes
    batches[step]
    assert removed_but_open(cache) == []
    assert total.prefetch_waits == 0
    assert total.bytes_read > 0
    if held_shards == NUM_SHARDS:
        assert total.cache_misses < NUM_SHARDS
    else:
        assert total.cache_misses > NUM_SHARDS  # each epoch fetches anew what was given up
        assert total.bytes_fetched > NUM_SHARDS * shard_bytes / 2


def test_of_small_files_beside_local_shards_some_are_looked_at_and_from_the_newest_step_on(
    folder: Path, cache: NodeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("audiotext_dist.data.prefetch.MAX_FILES_AHEAD", 10)
    store, shards = fsspec.filesystem("memory"), load_shards(str(folder))[:1] * 100
    for number in range(100):
        store.pipe_file(f"/small/{number}.tar", bytes(100))
    looked_at: list[int] = []

    def beside(shard: int) -> list[RemoteFile]:
        looked_at.append(shard)
        if shard == 3:
            prefetcher.advance(50)
        return [RemoteFile(f"memory://small/{shard}.tar", 100, None)]

    prefetcher = Prefetcher(
        cache, shards, lambda step: range(step, 100), max_bytes=10**6, beside=beside, has_remote=True
    )
    prefetcher.advance(0)
    prefetcher.wait_until_idle()
    assert looked_at == [0, 1, 2, 3, *range(50, 61)]
    assert {path.name.partition("-")[2] for path in shards_in(cache)} == {f"{number}.tar" for number in range(50, 60)}
    # What is there already does not count.
    prefetcher.advance(51)
    prefetcher.wait_until_idle()
    assert {path.name.partition("-")[2] for path in shards_in(cache)} == {f"{number}.tar" for number in range(50, 70)}


def test_listed_indexes_are_fetched_ahead_with_their_shards(site: str, folder: Path, cache: NodeCache) -> None:
    asked: list[str] = []

    def note(request: Request) -> None:
        asked.append(request.path)

    write_list(str(folder), list_rows(str(folder)))
    try:
        with proxy(site, note) as address:
            _listed_index.cache_clear()
            batches = training(f"{address}/set", cache)
            assert not any(path.endswith(".index.json") for path in asked)
            batches[0]
            batches._prefetcher.wait_until_idle()
            assert sum(path.endswith(".index.json") for path in asked) >= NUM_SHARDS
            asked.clear()
            for step in range(1, NUM_SHARDS * ROWS // 4):
                assert batches[step].keys
            assert asked == []
    finally:
        (folder / LIST_NAME).unlink()


def test_two_ranks_share_a_cache_that_holds_what_both_need(site: str, cache: NodeCache) -> None:
    shard_bytes = max(shard.index.shard_bytes for shard in load_shards(f"{site}/set", cache))
    cache = dataclasses.replace(cache, max_bytes=10 * shard_bytes)
    ranks = [training(f"{site}/set", cache, World(rank=rank, size=2, local_rank=rank, local_size=2)) for rank in (0, 1)]
    waits = 0
    for step in range(2 * NUM_SHARDS * ROWS // 4):
        for batches in ranks:
            counts = batches[step].counts
            waits += counts.prefetch_waits if step else 0
            batches._prefetcher.wait_until_idle()
    assert waits == 0


def test_evaluation_fetches_ahead_each_shard_once(site: str, cache: NodeCache) -> None:
    shards = load_shards(f"{site}/set", cache)
    decode = dataclasses.replace(DECODE, random=False)
    batches = EvaluationBatches(shards, decode, world=World(), batch_size=ROWS, cache=cache)
    batches[0]
    batches._prefetcher.wait_until_idle()
    assert len(shards_in(cache)) == NUM_SHARDS
    for number in range(1, len(batches)):
        batches[number]
    assert batches._reader.take_counts().prefetch_waits == 1


def test_shards_ahead_are_those_that_the_batches_read(folder: Path) -> None:
    sets = [load_shards(str(folder))]
    for world_size in (1, 2):
        plan = plan_of(sets, world_size)(0)
        for rank in range(world_size):
            for number in range(plan.num_batches):
                left = range(number, plan.num_batches)
                read = [slot.shard for b in left for slot in plan.batch(b, rank=rank, world_size=world_size)]
                ahead = list(plan.shards_ahead(number, rank=rank, world_size=world_size))
                assert set(read) <= set(ahead)
                # The present windows come first, and nothing is fetched that no window holds.
                lanes = 2 // world_size
                now = {slot.shard for slot in plan.batch(number, rank=rank, world_size=world_size)}
                assert now <= set(ahead[: lanes * DATA.window_shards])
                assert set(ahead) - set(read) <= set(ahead[: lanes * DATA.window_shards])


def test_a_cache_that_is_smaller_than_what_is_read_at_once_is_told_in_one_line(
    site: str, folder: Path, cache: NodeCache, caplog: pytest.LogCaptureFixture
) -> None:
    for spec, cache_bytes, is_told in [
        (f"{site}/set", 10**6, False),
        (f"{site}/set", 10, True),
        (str(folder), 10, False),
    ]:
        caplog.clear()
        data = dataclasses.replace(DATA, cache_bytes=cache_bytes)
        with caplog.at_level(logging.WARNING):
            warn_of_small_cache([load_shards(spec, cache)], data, global_batch_size=4, world=World())
        assert ["data.cache_bytes=10 is less than" in record.getMessage() for record in caplog.records] == [
            True
        ] * is_told


def _until_it_ends(rank: int, spec: str, unreachable: str, cache_folder: str) -> str:
    """What a rank says in the end."""
    cache = NodeCache(folder=f"{cache_folder}/{rank}", retry=HASTY)
    batches = training(spec, cache, World(rank=rank, size=2))
    reads = {slot.shard for slot in batches._own_slots(5)}
    assert (rank == 1) == (int(unreachable) in reads)
    assert sums_over_ranks([rank + 1, 5.0], CPU) == [3.0, 10.0]
    try:
        for _ in in_step(iterate(batches, range(12), num_workers=0, device=CPU)):
            pass
    except UserError as error:
        return str(error)
    return "nothing"


def test_a_shard_that_only_rank_1_needs_and_nobody_can_reach_ends_every_rank(
    site: str, cache: NodeCache, tmp_path: Path
) -> None:
    plan = plan_of([load_shards(f"{site}/set", cache)], 2)(0)
    own = [
        {slot.shard for number in range(plan.num_batches) for slot in plan.batch(number, rank=rank, world_size=2)}
        for rank in range(2)
    ]
    last = {slot.shard for slot in plan.batch(5, rank=1, world_size=2)}
    number = min(last - own[0])

    def unreachable(request: Request) -> Fault | None:
        return "503" if f"{number:05d}.tar" in request.path else None

    with proxy(site, unreachable) as address:
        told = run_on_ranks(_until_it_ends, 2, f"{address}/set", str(number), str(tmp_path))
    assert told[0] == told[1]
    assert told[0].startswith(f"after 4 attempts: cannot read {address}/set/{number:05d}.tar (HTTP 503)")
    assert "\n" not in told[0]


def tar_of(members: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, member in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(member)
            tar.addfile(entry, io.BytesIO(member))
    return content.getvalue()


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """Tars as LAION-CLAP's tools write them: other members beside the clips, no index."""
    path = tmp_path / "laion" / "0.tar"
    path.parent.mkdir()
    members = {"README.md": b"read me", "a.b/sizes.txt": b"{}"}
    for row in range(3):
        sample = make_sample(row, num_frames=0)
        members[f"a/{row}.flac"] = sample.flac
        members[f"a/{row}.json"] = json.dumps({"text": [f"caption {row}"], "tag": ["x"], "id": row}).encode()
        members[f"a/{row}.cls"] = members[f"a/{row}.v1.mp3"] = b"0"
    path.write_bytes(tar_of(members))
    return path


def test_a_remote_tar_without_an_index_is_scanned_once(elsewhere: Path, cache: NodeCache) -> None:
    fetched = []

    def count(request: Request) -> None:
        if request.method == "GET" and request.path == "/0.tar":
            fetched.append(request.number)

    with web_server(elsewhere.parent) as origin, proxy(origin, count) as address:
        (first,) = load_shards(f"{address}/0.tar", cache)
        num_gets = len(fetched)
        assert ShardReader([first], cache).read(0, 0, "flac")  # as it was fetched for the scan
        (second,) = load_shards(f"{address}/0.tar", cache)
        again = len(fetched) - num_gets
        for path in shards_in(cache):
            path.unlink()
        load_shards(f"{address}/0.tar", cache)
        assert (again, len(fetched) - num_gets) == (1, 2)  # one each to see that it is there
        assert shards_in(cache) == []
        assert first.index.to_json() == second.index.to_json()
        assert [key for key in first.index.keys if first.index.span(first.index.keys.index(key), "flac")] == [
            "a/0",
            "a/1",
            "a/2",
        ]
        assert set(first.index.members) == {"flac", "json"}
        # Another tar at the same place is another tar, although the old one is still here.
        os.close(cache.open(f"{address}/0.tar"))
        elsewhere.write_bytes(tar_of({"b.flac": b"1" * 5000, "b.json": b'{"text": "b"}'}))
        assert load_shards(f"{address}/0.tar", cache)[0].index.keys == ["b"]


def test_tars_without_an_index_are_scanned_once_where_the_cache_holds_only_some_of_them(
    elsewhere: Path, cache: NodeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, content = fsspec.filesystem("memory"), elsewhere.read_bytes()
    for number in range(6):
        store.pipe_file(f"/unlisted/{number}.tar", content)
    tight = dataclasses.replace(cache, max_bytes=5 * len(content) // 2)
    monkeypatch.setattr("audiotext_dist.data.shard.NUM_INDEX_READERS", 1)
    assert len(load_shards("memory://unlisted", tight)) == 6
    assert len(shards_in(tight)) < 6
    monkeypatch.setattr("audiotext_dist.data.shard.scan_tar", lambda *_: pytest.fail("scanned again"))
    assert len(load_shards("memory://unlisted", tight)) == 6


def test_a_local_tar_without_an_index_is_scanned_once(
    elsewhere: Path, cache: NodeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first,) = load_shards(str(elsewhere), cache)
    monkeypatch.setattr("audiotext_dist.data.shard.scan_tar", lambda *_: pytest.fail("scanned again"))
    assert load_shards(str(elsewhere), cache)[0].index.to_json() == first.index.to_json()


def test_a_remote_tar_that_is_cut_short_is_noticed_and_looked_at_again(elsewhere: Path, cache: NodeCache) -> None:
    whole = elsewhere.read_bytes()
    with web_server(elsewhere.parent) as address:
        for length in (1700, 5000, len(whole.rstrip(b"\0")) + 600):
            elsewhere.write_bytes(whole[:length])
            with pytest.raises(UserError, match=r"0\.tar (is cut short|cannot be read)"):
                load_shards(f"{address}/0.tar", cache)
        elsewhere.write_bytes(whole)
        assert len(load_shards(f"{address}/0.tar", cache)) == 1


def test_a_busy_server_is_not_one_without_the_file(site: str) -> None:
    with proxy(site, lambda request: "503" if request.number < 2 else None) as address:
        assert storage.exists(f"{address}/set/00000.index.json", HASTY)
        assert not storage.exists(f"{address}/set/nowhere", HASTY)
    with proxy(site, lambda request: "403") as address:
        assert not storage.exists(f"{address}/set/00000.index.json", HASTY)
    with proxy(site, lambda request: "503") as address, pytest.raises(UserError, match=r"after 4 attempts: .*503"):
        storage.exists(f"{address}/set/00000.index.json", HASTY)
