from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import soundfile
import webdataset

from audiotext_dist.data.shard import load_shards
from audiotext_dist.errors import UserError
from shards.build import AudioSetBuild, SoundscapeBuild, TableBuild, main
from shards.record import Record
from shards.report import RowReport
from shards.sources import audioset, soundscape, table
from tests.built import build_rows
from tests.media_files import noise, sweep, write_video

REPOSITORY = Path(__file__).parents[2]
REAL_DATA = REPOSITORY.parent / "shared" / "data"
RATE_HZ = 16000
NUM_ROWS = 11


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven rows: 2 is silent, 4 to 7 are missing (a whole shard of four), 9 is a film with sound."""
    folder = tmp_path_factory.mktemp("media")
    for row in range(NUM_ROWS):
        if row == 2:
            soundfile.write(folder / "2.wav", np.zeros(100, np.int16), RATE_HZ)
        elif row == 9:
            write_video(folder / "9.wav.mp4", 1.0, audio=sweep(1.0, RATE_HZ), rate_hz=RATE_HZ)
            (folder / "9.wav.mp4").rename(folder / "9.wav")
        elif row not in range(4, 8):
            soundfile.write(folder / f"{row}.wav", noise(1000 + row, seed=row), RATE_HZ)
    rows = [{"file": f"{row}.wav", "caption": f"sound {row}"} for row in range(NUM_ROWS)]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def config_for(media: Path, out: Path, **options: object) -> TableBuild:
    defaults = {
        "sample_rate_hz": RATE_HZ,
        "num_frames": 2,
        "clips_per_shard": 4,
        "num_workers": 0,
        "max_failed_share": 1.0,
    }
    return TableBuild(
        table=str(media / "list.jsonl"),
        dataset="d",
        out=str(out),
        **{**defaults, **options},  # type: ignore[arg-type]
    )


def build_table(config: TableBuild) -> list[RowReport] | None:
    return build_rows(config, list(table.records(config)))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_row_is_written_or_accounted_for(media: Path, tmp_path: Path) -> None:
    rows = build_table(config_for(media, tmp_path))
    assert pyarrow.parquet.read_table(tmp_path / "report.parquet").to_pylist() == [asdict(row) for row in rows]
    assert [row.row for row in rows] == list(range(NUM_ROWS))
    assert [row.reason for row in rows] == [None, None, "silent", None, *["missing"] * 4, None, None, None]
    assert [row.shard for row in rows if row.status == "written"] == ["00000.tar"] * 3 + ["00002.tar"] * 3
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == ["00000.tar", "00002.tar"]
    found = list(webdataset.WebDataset(str(tmp_path / "{00000,00002}.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in found] == [row.key for row in rows if row.status == "written"]
    assert {"0.jpg", "1.jpg"} <= found[4].keys()
    metadata = json.loads(found[4]["json"])
    assert (metadata["name"], metadata["text"], metadata["dataset"]) == ("9.wav", ["sound 9"], "d")
    assert len(metadata["frame_times"]) == 2
    shards = load_shards(str(tmp_path))
    assert [recording for shard in shards for recording in shard.index.recordings] == [
        f"d:{row.name}" for row in rows if row.status == "written"
    ]


def test_the_bytes_do_not_depend_on_the_number_of_workers(media: Path, tmp_path: Path) -> None:
    for num_workers in (0, 1, 2):
        build_table(config_for(media, tmp_path / str(num_workers), num_workers=num_workers))
    assert contents(tmp_path / "0") == contents(tmp_path / "1") == contents(tmp_path / "2")


def test_finished_shards_are_kept_and_others_built_again(media: Path, tmp_path: Path) -> None:
    build_table(config_for(media, tmp_path))
    expected = contents(tmp_path)
    kept = {name: (tmp_path / name).stat().st_mtime_ns for name in ("00000.tar", "00001.report.parquet")}
    inode = (tmp_path / "00002.tar").stat().st_ino
    (tmp_path / "00002.index.json").unlink()
    (tmp_path / "00002.tar").write_bytes(b"half")
    (tmp_path / ".00002.tar.123.tmp").touch()
    build_table(config_for(media, tmp_path))
    assert contents(tmp_path) == expected
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in kept} == kept
    assert (tmp_path / "00002.tar").stat().st_ino != inode


def test_another_set_in_the_folder_is_refused_by_the_option_that_differs(media: Path, tmp_path: Path) -> None:
    lists = shutil.copytree(media, tmp_path / "media")
    config = config_for(lists, tmp_path / "out")
    build_table(config)
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=r"begun with jpeg_quality=90, not 50.*mode=overwrite"):
        build_table(replace(config, jpeg_quality=50))
    moved = (lists / "list.jsonl").rename(lists / "moved.jsonl")
    build_table(replace(config, table=str(moved), num_workers=2, max_failed_share=0.5))
    moved.write_text(moved.read_text().replace("sound 3", "sound three"))
    with pytest.raises(UserError, match="begun with table=sha256:"):
        build_table(replace(config, table=str(moved)))
    assert contents(tmp_path / "out") == before


def test_overwrite_removes_the_old_set_and_nothing_else(media: Path, tmp_path: Path) -> None:
    build_table(config_for(media, tmp_path / "out", clips_per_shard=1))
    (tmp_path / "out" / "notes.txt").write_text("mine")
    build_table(config_for(media, tmp_path / "out", mode="overwrite"))
    build_table(config_for(media, tmp_path / "new"))
    assert contents(tmp_path / "out") == {**contents(tmp_path / "new"), "notes.txt": b"mine"}


@pytest.mark.parametrize("mode", ["resume", "overwrite"])
def test_tars_of_something_else_are_left_alone(media: Path, tmp_path: Path, mode: str) -> None:
    (tmp_path / "00000.tar").write_bytes(b"theirs")
    with pytest.raises(UserError, match="another out="):
        build_table(config_for(media, tmp_path, mode=mode))
    assert contents(tmp_path) == {"00000.tar": b"theirs"}


def test_a_place_that_cannot_be_written_is_named(media: Path) -> None:
    with pytest.raises(UserError, match="cannot write"):
        build_table(config_for(media, media / "list.jsonl" / "out"))


def test_equal_names_are_an_error_that_names_one(tmp_path: Path) -> None:
    config = config_for(tmp_path, tmp_path / "out")
    twice = [Record(name=name, media=None, recording="r") for name in ("a", "b", "a")]
    with pytest.raises(UserError, match="rows 0 and 2 are both named 'a'"):
        build_rows(config, twice)
    with pytest.raises(UserError, match="no rows"):
        build_rows(config, [])


# Ends the process, as a power cut would, before the file named first in its arguments is written, or, given a
# number, in the middle of the shard of that row. Says first which workers it leaves behind.
KILLED_BUILD = """
import multiprocessing, os, signal, sys
from audiotext_dist import storage
from shards import build, job

def kill():
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

point = sys.argv.pop(1)
write_bytes, row_report = storage.write_bytes, job.row_report

def write_unless_killed(path, content):
    if path.endswith("/" + point):
        kill()
    write_bytes(path, content)

def report_unless_killed(row, *rest):
    if str(row) == point:
        kill()
    return row_report(row, *rest)

storage.write_bytes, job.row_report = write_unless_killed, report_unless_killed
build.main()
"""


@pytest.mark.parametrize(
    ("point", "num_workers"),
    [
        ("1", 0),
        ("00001.report.parquet", 0),
        ("10", 2),
        ("00002.index.json", 0),
        ("report.parquet", 0),
    ],
)
def test_a_killed_build_goes_on_to_the_same_bytes(media: Path, tmp_path: Path, point: str, num_workers: int) -> None:
    config = config_for(media, tmp_path / "killed", num_workers=num_workers)
    options = ["table", "num_workers", "out", "clips_per_shard", "sample_rate_hz", "num_frames", "dataset"]
    words = [f"{key}={getattr(config, key)}" for key in options]
    # Not a pipe: workers that outlive the build would keep it open.
    with (tmp_path / "said").open("w") as said:
        killed = subprocess.run(
            [sys.executable, "-c", KILLED_BUILD, point, "table", *words], cwd=REPOSITORY, stdout=said, check=False
        )
    assert killed.returncode == -9
    workers = [int(pid) for pid in (tmp_path / "said").read_text().split()]
    assert len(workers) == (2 if num_workers == 2 else 0)
    for worker in workers:
        wait_for_end(worker)
    assert not (tmp_path / "killed" / "report.parquet").exists()
    build_table(replace(config, num_workers=0))
    build_table(config_for(media, tmp_path / "whole"))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def wait_for_end(pid: int) -> None:
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    has_ended = poll.poll(20_000)
    if not has_ended:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    os.close(handle)
    assert has_ended, "the worker outlives the build that was killed"


def run_command(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["build.py", *words])
    main()


def test_too_many_failures_end_in_an_error_after_all_is_written(
    media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["table", f"table={media}/list.jsonl", "dataset=d", f"out={tmp_path}", "num_workers=0"]
    with pytest.raises(UserError, match=r"45\.5% of 11 clips failed.*4 of them as 'missing'.*media folder"):
        run_command(monkeypatch, *words)
    assert (tmp_path / "report.parquet").is_file()
    assert "6 of 11 clips written in 1 shards" in capsys.readouterr().out
    run_command(monkeypatch, *words, "max_failed_share=0.5")


def test_help_tells_the_keys(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_command(monkeypatch, "--help")
    assert "soundscape" in capsys.readouterr().out
    for source, key in (
        *(("table", "recording_pattern="), ("audioset", "class_labels="), ("soundscape", "seed=")),
        *(("audiocaps", "whole_videos="), ("clotho", "metadata="), ("wavcaps", "allow_unused_exclusions=")),
    ):
        run_command(monkeypatch, source, "--help")
        said = capsys.readouterr().out
        assert key in said
        assert "out=(required)" in said
        assert "AWS_ENDPOINT_URL" in said
    with pytest.raises(UserError, match="no source 'tabel'"):
        run_command(monkeypatch, "tabel")


def test_a_wrong_word_is_one_line_and_exit_code_2() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "shards.build", "table", "tabel=x"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == "error: unknown key 'tabel': did you mean 'table'?\n"


@pytest.mark.parametrize(
    "wrong", [{"clips_per_shard": 0}, {"num_workers": -1}, {"max_failed_share": 2.0}, {"jpeg_quality": 0}]
)
def test_impossible_build_options_are_refused(media: Path, tmp_path: Path, wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        config_for(media, tmp_path, **wrong)


def test_a_soundscape_is_packed(tmp_path: Path) -> None:
    config = SoundscapeBuild(media=str(tmp_path / "media"), out=str(tmp_path / "out"), num_clips=2, num_workers=0)
    rows = build_rows(config, list(soundscape.records(config, config.num_workers)))
    assert [row.status for row in rows] == ["written", "written"]
    sample = next(iter(webdataset.WebDataset(str(tmp_path / "out/00000.tar"), shardshuffle=False)))
    assert {"flac", "json", "0.jpg", "3.jpg"} <= sample.keys()


def test_real_clips_are_packed(tmp_path: Path) -> None:
    folder = REAL_DATA / "av"
    if not folder.is_dir():
        pytest.skip("the VGGSound clips are not on this machine")
    config = AudioSetBuild(
        segments=str(folder / "segments.csv"), media=str(folder / "media"), out=str(tmp_path), clips_per_shard=3
    )
    records = list(audioset.records(config))
    assert sum(record.media is not None for record in records) == 20
    # Decoding all of them takes too long for a test.
    rows = build_rows(config, records[:4])
    assert [row.status for row in rows] == ["written"] * 4
    assert all(9.9 < row.seconds < 10.1 for row in rows)
    (index,) = {tuple(shard.index.members) for shard in load_shards(str(tmp_path))}
    assert index == ("0.jpg", "1.jpg", "2.jpg", "3.jpg", "flac", "json")
