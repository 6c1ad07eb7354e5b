"""Shards on s3://, against a real server that is sometimes slow, busy or closed."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import soundfile

from audiotext_dist import storage
from audiotext_dist.errors import UserError
from shards.statistics import StatisticsConfig, measure
from shards.verify import VerifyConfig, verify
from tests.media_files import noise
from tests.object_store import SECRET, Fault, Request, environment, objects, proxy, server, use

REPOSITORY = Path(__file__).parents[2]
RATE_HZ = 16000
LARGER_THAN_TWO_PARTS_BYTES = 101 << 20  # s3fs puts smaller files in one request


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    for row in range(6):
        soundfile.write(folder / f"{row}.wav", noise(500 + row, seed=row), RATE_HZ)
    (folder / "list.csv").write_text("file,caption\n" + "".join(f"{row}.wav,sound {row}\n" for row in range(7)))
    return folder


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    with server() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(store: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    use(monkeypatch, store)
    name = f"bucket-{abs(hash(request.node.name))}"
    fsspec.filesystem("s3").mkdir(name)
    return name


def build(media: Path, out: str, endpoint: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shards.build", "table", f"table={media}/list.csv", "dataset=d", f"out={out}"]
    options = ["sample_rate_hz=16000", "num_frames=0", "clips_per_shard=3", "num_workers=0", "max_failed_share=1"]
    return subprocess.run(
        [*command, *options, *words],
        cwd=REPOSITORY,
        env={"PATH": "", "PYTHONPATH": ":".join(sys.path), **environment(endpoint)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_set_is_the_same_on_a_server_that_is_busy_at_times_as_on_a_disk(
    media: Path, store: str, bucket: str, tmp_path: Path
) -> None:
    def busy_once(request: Request) -> Fault | None:
        return "503" if request.number == 0 and request.method == "PUT" else None

    with proxy(store, busy_once) as endpoint:
        built = build(media, f"s3://{bucket}/set", endpoint)
        checked = build(media, f"s3://{bucket}/set", endpoint, "mode=check")
    assert (built.returncode, checked.returncode) == (0, 0), built.stderr + checked.stderr
    assert build(media, str(tmp_path / "set"), store).returncode == 0
    found = objects(store, bucket)
    assert found == {f"set/{path.name}": path.read_bytes() for path in (tmp_path / "set").iterdir()}
    assert len(found) == 2 + 4 + 2 + 2  # the third shard's one row is missing
    assert all(SECRET.encode() not in content for content in found.values())


@pytest.mark.parametrize(("fault", "reason"), [("503", "SlowDown"), ("403", "AccessDenied")])
def test_a_refused_object_is_named_in_one_line_and_the_job_can_go_on(
    media: Path, store: str, bucket: str, fault: Fault, reason: str
) -> None:
    def refuse(request: Request) -> Fault | None:
        return fault if request.method == "PUT" and "00001.tar" in request.path else None

    with proxy(store, refuse) as endpoint:
        refused = build(media, f"s3://{bucket}/set", endpoint)
    assert refused.returncode == 2
    assert refused.stderr.splitlines() == [
        f"error: cannot write s3://{bucket}/set/00001.tar ({reason}): mend the cause, then run the same command again"
    ]
    assert SECRET not in refused.stdout + refused.stderr
    assert "set/00000.index.json" in objects(store, bucket)
    assert build(media, f"s3://{bucket}/set", store).returncode == 0
    assert "set/report.parquet" in objects(store, bucket)


def test_a_bucket_that_is_not_there_and_a_server_that_is_not_there_are_told(media: Path, store: str) -> None:
    for endpoint in (store, "http://127.0.0.1:9"):
        found = build(media, "s3://nowhere/set", endpoint)
        assert found.returncode == 2
        assert found.stderr.startswith("error: cannot ")
        assert "s3://nowhere/set" in found.stderr
        assert len(found.stderr.splitlines()) == 1
        assert SECRET not in found.stderr


def test_credentials_in_the_address_are_refused_and_not_repeated(media: Path, store: str) -> None:
    found = build(media, f"s3://me:{SECRET}@bucket/set", store)
    assert found.returncode == 2
    assert "AWS_SECRET_ACCESS_KEY" in found.stderr
    assert SECRET not in found.stderr


def test_a_large_file_goes_in_parts_and_a_held_back_part_is_sent_again(
    store: str, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = random.Random(1).randbytes(LARGER_THAN_TWO_PARTS_BYTES)
    parts = []

    def hold_back_the_second_part_once(request: Request) -> Fault | None:
        if "partNumber=" in request.path:
            parts.append(request)
        return "stall" if "partNumber=2" in request.path and request.number == 0 else None

    with proxy(store, hold_back_the_second_part_once) as endpoint:
        use(monkeypatch, endpoint)
        monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 2}})
        with storage.atomic_file(f"s3://{bucket}/large.tar") as temporary:
            temporary.write_bytes(content)
    assert objects(store, bucket) == {"large.tar": content}
    assert len({request.path for request in parts}) == 3
    assert len(parts) >= 4


def test_a_write_that_fails_in_the_middle_leaves_no_object(bucket: str, store: str) -> None:
    def fail() -> None:
        with storage.atomic_file(f"s3://{bucket}/half.tar") as temporary:
            temporary.write_bytes(b"half")
            raise UserError("lost")

    with pytest.raises(UserError, match="lost"):
        fail()
    assert objects(store, bucket) == {}


def test_a_set_on_a_server_is_verified_and_measured_as_on_a_disk(
    media: Path, store: str, bucket: str, tmp_path: Path
) -> None:
    for out in (f"s3://{bucket}/set", str(tmp_path / "set")):
        assert build(media, out, store).returncode == 0
    remote, local = (
        VerifyConfig(splits={"train": out}, num_workers=1) for out in (f"s3://{bucket}/set", str(tmp_path / "set"))
    )
    assert verify(remote).to_json() == verify(local).to_json()
    of_remote, of_local = (
        measure(StatisticsConfig(shards=out, sample_rate_hz=16000, num_workers=1))
        for out in (f"s3://{bucket}/set", str(tmp_path / "set"))
    )
    assert of_remote.mean_and_std == of_local.mean_and_std
    assert (of_remote.num_bytes, of_remote.num_shards) == (of_local.num_bytes, 2)
    tar = bytearray(objects(store, bucket)["set/00001.tar"])
    tar[len(tar) // 2] ^= 1
    fsspec.filesystem("s3").pipe_file(f"{bucket}/set/00001.tar", bytes(tar))
    assert {finding.place for finding in verify(remote).findings} == {f"s3://{bucket}/set/00001.tar"}
