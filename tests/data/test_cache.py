"""The node's cache of remote shards: its bound, what it gives up, kills, damage, and servers in trouble."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audiotext_dist.data.cache import NodeCache
from audiotext_dist.data.cache_folder import name_of
from audiotext_dist.data.read_counts import ReadCounts
from audiotext_dist.errors import UserError
from audiotext_dist.retry import MAX_PAUSE_SECONDS, RefusalError, RetryConfig
from tests.object_store import Fault, Request, proxy
from tests.web import web_server

REPOSITORY = Path(__file__).parents[2]
HASTY = RetryConfig(retries=2, stall_seconds=0.5, first_pause_seconds=0.01)
CONTENT = random.Random(1).randbytes(300_000)


def read(cache: NodeCache, url: str, content: bytes, counts: ReadCounts | None = None) -> bytes:
    """The file as the cache gives it, where the index speaks of ``content``."""
    descriptor = cache.open(url, num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest(), counts=counts)
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def held(cache: NodeCache) -> set[str]:
    """The names of all that lies in the cache, without the digests of their URLs."""
    return {path.name.partition("-")[2] for path in Path(cache.folder).iterdir() if path.name != ".room.lock"}


def in_memory(**files: bytes) -> dict[str, str]:
    store = fsspec.filesystem("memory")
    for name, content in files.items():
        store.pipe_file(f"/set/{name}.tar", content)
    return {name: f"memory://set/{name}.tar" for name in files}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "site").mkdir()
    for name in ("a", "b"):
        (tmp_path / "site" / f"{name}.tar").write_bytes(CONTENT)
    with web_server(tmp_path / "site") as address:
        yield address


@settings(max_examples=25, deadline=None)
@given(data=st.data(), sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6), max_bytes=st.integers(1, 100))
def test_it_holds_what_was_used_last_and_no_more_than_its_bytes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, sizes: list[int], max_bytes: int
) -> None:
    cache = NodeCache(folder=str(tmp_path_factory.mktemp("cache")), max_bytes=max_bytes)
    contents = {f"s{number}": bytes([number]) * size for number, size in enumerate(sizes)}
    urls = in_memory(**contents)
    expected: OrderedDict[str, int] = OrderedDict()
    for name in data.draw(st.lists(st.sampled_from(sorted(urls)), max_size=12)):
        counts = ReadCounts()
        assert read(cache, urls[name], contents[name], counts) == contents[name]
        assert (counts.cache_hits, counts.cache_misses) == ((1, 0) if name in expected else (0, 1))
        if name not in expected:
            while expected and sum(expected.values()) + len(contents[name]) > max_bytes:
                expected.popitem(last=False)
            expected[name] = len(contents[name])
        expected.move_to_end(name)
        assert held(cache) == {f"{name}.tar" for name in expected}


def test_equal_base_names_do_not_meet(tmp_path: Path) -> None:
    cache = NodeCache(folder=str(tmp_path))
    store = fsspec.filesystem("memory")
    for folder in ("one", "two"):
        store.pipe_file(f"/{folder}/0.tar", folder.encode())
    assert [read(cache, f"memory://{folder}/0.tar", folder.encode()) for folder in ("one", "two")] == [b"one", b"two"]


def test_a_file_that_was_made_anew_with_as_many_bytes_is_another_file(tmp_path: Path) -> None:
    cache = NodeCache(folder=str(tmp_path))
    for content in (b"dog", b"cat", b"cat"):
        (url,) = in_memory(a=content).values()
        assert read(cache, url, content) == content


def test_a_file_that_was_opened_to_learn_its_content_is_found_under_it(tmp_path: Path) -> None:
    cache = NodeCache(folder=str(tmp_path))
    (url,) = in_memory(a=CONTENT).values()
    os.close(cache.open(url))
    cache.know(url, hashlib.sha256(CONTENT).hexdigest())
    counts = ReadCounts()
    assert read(cache, url, CONTENT, counts) == CONTENT
    assert counts == ReadCounts(cache_hits=1)
    assert held(cache) == {"a.tar"}


def test_a_file_that_is_open_can_be_given_up_and_still_be_read(tmp_path: Path) -> None:
    cache = NodeCache(folder=str(tmp_path), max_bytes=10)
    urls = in_memory(a=b"a" * 10, b=b"b" * 10)
    descriptor = cache.open(urls["a"])
    read(cache, urls["b"], b"b" * 10)
    assert held(cache) == {"b.tar"}
    assert os.pread(descriptor, 20, 0) == b"a" * 10
    os.close(descriptor)


def test_what_somebody_says_to_need_soon_goes_last(tmp_path: Path) -> None:
    cache = NodeCache(folder=str(tmp_path), max_bytes=20)
    contents = {name: name.encode() * 10 for name in "abcd"}
    urls = in_memory(**contents)
    with cache.wishes() as say:
        say([name_of(urls["a"], hashlib.sha256(contents["a"]).hexdigest())])
        for name in "abc":
            read(cache, urls[name], contents[name])
        assert {name for name in held(cache) if name} == {"a.tar", "c.tar"}
    read(cache, urls["d"], contents["d"])
    assert held(cache) == {"c.tar", "d.tar"}


def test_a_file_damaged_on_the_disk_is_fetched_again(tmp_path: Path) -> None:
    cache = NodeCache(folder=str(tmp_path))
    (url,) = in_memory(a=CONTENT).values()
    read(cache, url, CONTENT)
    (file,) = tmp_path.glob("*.tar")
    os.truncate(file, 1000)
    counts = ReadCounts()
    assert read(cache, url, CONTENT, counts) == CONTENT
    assert counts == ReadCounts(bytes_fetched=len(CONTENT), cache_misses=1, prefetch_waits=1)


@pytest.mark.parametrize("changed", [CONTENT[:-1] + b"?", CONTENT + b"?"], ids=["other", "longer"])
def test_a_changed_shard_is_refused_by_name_and_not_kept(tmp_path: Path, changed: bytes) -> None:
    cache = NodeCache(folder=str(tmp_path), retry=HASTY)
    (url,) = in_memory(a=changed).values()
    with pytest.raises(UserError, match=r"^memory://set/a\.tar is not what its index describes"):
        read(cache, url, CONTENT)
    assert held(cache) == set()


def test_a_shard_that_became_shorter_is_refused_by_name(tmp_path: Path) -> None:
    (url,) = in_memory(a=CONTENT[:-1]).values()
    with pytest.raises(UserError, match=r"after 3 attempts: memory://set/a\.tar ends after 299999 of 300000 bytes"):
        read(NodeCache(folder=str(tmp_path), retry=HASTY), url, CONTENT)


def test_a_folder_that_cannot_be_written_to_is_named() -> None:
    (url,) = in_memory(a=b"a").values()
    with pytest.raises(UserError, match=r"data\.cache_dir=/proc/cache cannot be written to"):
        NodeCache(folder="/proc/cache").open(url)


def test_a_shard_for_which_the_disk_has_no_room_is_told_before_it_is_fetched(tmp_path: Path) -> None:
    cache = NodeCache(folder=str(tmp_path))
    (url,) = in_memory(a=b"a").values()
    with pytest.raises(UserError, match=r"data\.cache_dir=.* has no room for 1\d{18} bytes"):
        cache.open(url, num_bytes=10**18)


@pytest.mark.parametrize("fault", ["500", "503", "reset", "cut", "stall", "freeze"])
def test_a_web_server_in_trouble_is_asked_again(tmp_path: Path, site: str, fault: Fault) -> None:
    asked = []

    def twice(request: Request) -> Fault | None:
        asked.append(request.number)
        return fault if request.number < 2 else None

    cache = NodeCache(folder=str(tmp_path / "cache"), retry=HASTY)
    with proxy(site, twice) as address:
        assert read(cache, f"{address}/a.tar", CONTENT) == CONTENT
    assert asked == [0, 1, 2]
    assert held(cache) == {"a.tar"}


@pytest.mark.parametrize(("fault", "attempts"), [("500", 3), ("stall", 3), ("cut", 3), ("403", 1)], ids=str)
def test_a_web_server_that_stays_in_trouble_is_given_up_in_one_line(
    tmp_path: Path, site: str, fault: Fault, attempts: int
) -> None:
    asked = []

    def always(request: Request) -> Fault:
        asked.append(request.number)
        return fault

    cache = NodeCache(folder=str(tmp_path / "cache"), retry=HASTY)
    with proxy(site, always) as address, pytest.raises(UserError) as caught:
        read(cache, f"{address}/a.tar?signature=secret", CONTENT)
    assert f"{address}/a.tar" in str(caught.value)
    assert ("after 3 attempts: " in str(caught.value)) == (attempts == 3)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    # A body that is cut later than the one before begins the count anew.
    assert len(asked) == attempts or (fault == "cut" and len(asked) > attempts)
    # Only who would wait as long again is told the same.
    assert held(cache) == ({"a.tar.refused"} if attempts == 3 else set())


def test_who_waited_while_a_server_refused_is_told_the_same_and_who_comes_later_asks_anew(
    tmp_path: Path, site: str
) -> None:
    """Three processes' reads of one shard, which the first to come asks for; and one that fetches ahead."""
    cache = NodeCache(folder=str(tmp_path / "cache"), retry=HASTY)
    asked: list[int] = []
    is_up, all_wait = threading.Event(), threading.Event()

    def refuse(request: Request) -> Fault | None:
        asked.append(request.number)
        assert all_wait.wait(60)
        return None if is_up.is_set() else "503"

    with proxy(site, refuse) as address, ThreadPoolExecutor(3) as processes:
        counts = [ReadCounts() for _ in range(3)]
        reads = [processes.submit(read, cache, f"{address}/a.tar", CONTENT, each) for each in counts]
        while not all(each.prefetch_waits for each in counts):
            time.sleep(0.001)
        all_wait.set()
        told = {str(each.exception(60)) for each in reads}
        assert len(told) == 1
        assert told.pop().startswith(f"after 3 attempts: cannot read {address}/a.tar (HTTP 503)")
        assert len(asked) == 3
        digest = hashlib.sha256(CONTENT).hexdigest()
        with pytest.raises(UserError, match="after 3 attempts"):
            cache.fetch_ahead(f"{address}/a.tar", num_bytes=len(CONTENT), sha256=digest, counts=ReadCounts())
        assert len(asked) == 3
        is_up.set()
        assert read(cache, f"{address}/a.tar", CONTENT) == CONTENT
    assert held(cache) == {"a.tar"}


def test_a_shard_that_is_gone_is_named_at_once(tmp_path: Path, site: str) -> None:
    with pytest.raises(UserError, match=r"nowhere\.tar is not there any more"):
        read(NodeCache(folder=str(tmp_path / "cache")), f"{site}/nowhere.tar", CONTENT)


def test_a_body_goes_on_where_it_was_cut_off_for_as_long_as_it_gets_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand bytes an attempt: many more attempts than retries."""
    starts = []

    def a_little(path: str, start: int, retry: RetryConfig) -> Iterator[tuple[int, bytes]]:
        starts.append(start)
        yield start, CONTENT[:9500][start : start + 1000]

    monkeypatch.setattr("audiotext_dist.storage.blocks", a_little)
    quick = RetryConfig(retries=1, first_pause_seconds=0.0)
    assert read(NodeCache(folder=str(tmp_path), retry=quick), "s3://b/a.tar", CONTENT[:9500]) == CONTENT[:9500]
    assert starts == list(range(0, 9500, 1000))


def test_a_server_is_given_up_after_as_long_as_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    retry = RetryConfig(retries=8, stall_seconds=20.0, first_pause_seconds=0.5)
    slept = []

    def stall(*_: object) -> Iterator[tuple[int, bytes]]:
        slept.append(retry.stall_seconds)
        raise RefusalError("stalled", transient=True)

    monkeypatch.setattr("audiotext_dist.storage.blocks", stall)
    monkeypatch.setattr("audiotext_dist.data.cache.time.sleep", slept.append)
    monkeypatch.setattr("audiotext_dist.retry.random.uniform", lambda _, highest: highest)
    with pytest.raises(UserError, match="after 9 attempts"):
        NodeCache(folder=str(tmp_path), retry=retry).open("s3://b/a.tar", num_bytes=1)
    assert retry.longest_seconds == sum(slept) == 271.5
    # For ever, as some say it.
    assert RetryConfig(retries=10**12, first_pause_seconds=30.0).longest_seconds == 50e12 + 20


def test_pauses_grow_up_to_a_limit_and_differ() -> None:
    retry = RetryConfig(first_pause_seconds=1.0)
    for failures, longest in [(1, 1.0), (2, 2.0), (4, 8.0), (1000, MAX_PAUSE_SECONDS)]:
        pauses = [retry.pause_seconds(failures) for _ in range(20)]
        assert all(longest / 2 <= pause <= longest for pause in pauses)
        assert len(set(pauses)) > 1


@contextlib.contextmanager
def fetching(cache: NodeCache, url: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of its own that fetches a file of CONTENT."""
    digest = hashlib.sha256(CONTENT).hexdigest()
    program = (
        "from audiotext_dist.data.cache import NodeCache\n"
        f"NodeCache(folder={cache.folder!r}).open({url!r}, num_bytes={len(CONTENT)}, sha256={digest!r})"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}
    ) as process:
        yield process


def test_a_fetch_that_is_killed_leaves_no_lock_no_half_file_and_no_bytes_that_count(tmp_path: Path, site: str) -> None:
    frozen = threading.Event()

    def freeze_the_first(request: Request) -> Fault | None:
        if request.path == "/a.tar" and request.number == 0:
            frozen.set()
            return "freeze"
        return None

    # There is room for one of the two.
    cache = NodeCache(folder=str(tmp_path / "cache"), max_bytes=len(CONTENT) + 1000, retry=HASTY)
    with proxy(site, freeze_the_first) as address:
        with fetching(cache, f"{address}/a.tar") as process:
            assert frozen.wait(60)
            assert held(cache) == {"a.tar.lock", "a.tar.part"}
            process.send_signal(signal.SIGKILL)
        (url,) = in_memory(small=b"s" * 1000).values()
        read(cache, url, b"s" * 1000)
        # Had the killed one's bytes counted, the next would have driven out what is here.
        assert held(cache) == {"small.tar"}
        assert read(cache, f"{address}/a.tar", CONTENT) == CONTENT
        assert held(cache) == {"a.tar", "small.tar"}


def test_a_fetch_under_way_is_waited_for_counted_and_left_alone(tmp_path: Path, site: str) -> None:
    entered, released, asked = threading.Event(), threading.Event(), []

    def hold_the_first(request: Request) -> Fault | None:
        asked.append(request.path)
        if request.path == "/a.tar":
            entered.set()
            assert released.wait(60)
        return None

    cache = NodeCache(folder=str(tmp_path / "cache"), max_bytes=len(CONTENT) + 1000)
    with proxy(site, hold_the_first) as address:
        with fetching(cache, f"{address}/a.tar") as process:
            assert entered.wait(60)
            try:
                for name in ("first", "second"):
                    (url,) = in_memory(**{name: b"s" * 1000}).values()
                    read(cache, url, b"s" * 1000)
                    assert held(cache) == {"a.tar.lock", "a.tar.part", f"{name}.tar"}
                digest = hashlib.sha256(CONTENT).hexdigest()
                ahead = cache.fetch_ahead(
                    f"{address}/a.tar", num_bytes=len(CONTENT), sha256=digest, counts=ReadCounts()
                )
                assert not ahead
            finally:
                released.set()
            assert read(cache, f"{address}/a.tar", CONTENT) == CONTENT
        assert process.returncode == 0
    assert asked == ["/a.tar"]
