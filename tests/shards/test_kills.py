"""A build that is killed at random moments ends in the set of one that was left alone, byte for byte."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
import soundfile

from tests.media_files import noise, sweep, write_video
from tests.object_store import environment, objects, server, use

REPOSITORY = Path(__file__).parents[2]
RATE_HZ = 16000
NUM_ROWS = 90
CLIPS_PER_SHARD = 1  # some kills let a shard or two be finished: more shards than kills


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sounds and films; every seventh file is missing."""
    folder = tmp_path_factory.mktemp("media")
    for row in range(NUM_ROWS):
        if row % 10 == 9:
            write_video(folder / f"{row}.mp4", 1.0, audio=sweep(1.0, RATE_HZ), rate_hz=RATE_HZ)
            (folder / f"{row}.mp4").rename(folder / f"{row}.wav")
        elif row % 7:
            soundfile.write(folder / f"{row}.wav", noise(RATE_HZ * 5, seed=row), RATE_HZ)
    return folder


def build_and_kill(media: Path, out: str, whole: str, num_kills: int, **variables: str) -> int:
    """Builds ``whole`` in peace and ``out`` with kills; returns how many kills met a build."""
    rows = "".join(f"{row}.wav,sound {row}\n" for row in range(NUM_ROWS))
    (media / "list.csv").write_text("file,caption\n" + rows)
    script = ["tests/shards/killed_builds.py", "17", str(num_kills), f"out={whole}"]
    words = ["table", f"table={media}/list.csv", f"out={out}", "dataset=d", "num_frames=2"]
    found = subprocess.run(
        [sys.executable, *script, *words, f"clips_per_shard={CLIPS_PER_SHARD}", "num_workers=2", "max_failed_share=1"],
        cwd=REPOSITORY,
        env={"PATH": "", "PYTHONPATH": ":".join([str(REPOSITORY), *sys.path]), "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return int(found.stdout)


def num_tars(media: Path) -> int:
    return sum((media / f"{row}.wav").exists() for row in range(NUM_ROWS))


def check_disk(media: Path, folder: Path, num_kills: int) -> int:
    num_killed = build_and_kill(media, str(folder / "killed"), str(folder / "whole"), num_kills)
    killed, whole = (
        {path.name: path.read_bytes() for path in (folder / name).iterdir()} for name in ("killed", "whole")
    )
    assert killed == whole
    assert sum(name.endswith(".tar") for name in whole) == num_tars(media)
    print(num_killed, "of", num_kills, "kills met a build")
    return num_killed


def check_s3(media: Path, monkeypatch: pytest.MonkeyPatch, num_kills: int) -> int:
    with server() as endpoint:
        use(monkeypatch, endpoint)
        for name in ("killed", "whole"):
            fsspec.filesystem("s3").mkdir(name)
        num_killed = build_and_kill(media, "s3://killed/set", "s3://whole/set", num_kills, **environment(endpoint))
        killed, whole = objects(endpoint, "killed"), objects(endpoint, "whole")
    assert killed == whole
    assert sum(name.endswith(".tar") for name in whole) == num_tars(media)
    print(num_killed, "of", num_kills, "kills met a build")
    return num_killed


def test_some_kills_on_a_disk(media: Path, tmp_path: Path) -> None:
    assert check_disk(media, tmp_path, 2) >= 1


@pytest.mark.faults
def test_twenty_kills_on_a_disk(media: Path, tmp_path: Path) -> None:
    assert check_disk(media, tmp_path, 20) > 15


@pytest.mark.faults
def test_twenty_kills_on_s3(media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_s3(media, monkeypatch, 20) > 15
