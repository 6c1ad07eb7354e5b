"""Jobs beside each other, jobs that are run again, and what they find on a bad day."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from audiotext_dist import storage
from audiotext_dist.data.shard import load_shards
from audiotext_dist.data.shard_list import LIST_NAME, read_list, write_list
from audiotext_dist.errors import UserError
from shards import job
from shards.build import TableBuild, main
from shards.finished import list_rows
from shards.job import own_shards, shard_rows
from shards.record import Record
from shards.report import RowReport
from shards.sources import table
from tests.built import build_rows
from tests.media_files import noise

REPOSITORY = Path(__file__).parents[2]
RATE_HZ = 16000
NUM_ROWS = 10


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """Ten rows; 4 and 5, a whole shard of two, are missing, and so is 7."""
    folder = tmp_path / "media"
    folder.mkdir()
    for row in range(NUM_ROWS):
        if row not in (4, 5, 7):
            write_sound(folder, row)
    rows = "".join(f"{row}.wav,sound {row}\n" for row in range(NUM_ROWS))
    (folder / "list.csv").write_text("file,caption\n" + rows)
    return folder


def write_sound(folder: Path, row: int) -> None:
    soundfile.write(folder / f"{row}.wav", noise(1000 + row, seed=row), RATE_HZ)


def config_for(media: Path, out: Path, **options: object) -> TableBuild:
    defaults = {"sample_rate_hz": RATE_HZ, "clips_per_shard": 2, "num_workers": 0, "max_failed_share": 1.0}
    return TableBuild(
        table=str(media / "list.csv"),
        dataset="d",
        out=str(out),
        **{**defaults, **options},  # type: ignore[arg-type]
    )


def build_table(config: TableBuild) -> list[RowReport] | None:
    return build_rows(config, list(table.records(config)))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@given(num_shards=st.integers(0, 200), num_parts=st.integers(1, 70))
def test_every_shard_is_one_parts(num_shards: int, num_parts: int) -> None:
    parts = [
        own_shards(TableBuild(table="", dataset="", out="", part=f"{part}/{num_parts}"), num_shards)
        for part in range(1, num_parts + 1)
    ]
    assert sorted(number for part in parts for number in part) == list(range(num_shards))
    assert all(number % num_parts == index for index, part in enumerate(parts) for number in part)


@given(num_rows=st.integers(1, 5000), clips_per_shard=st.integers(1, 300))
def test_every_row_is_in_one_shard(num_rows: int, clips_per_shard: int) -> None:
    shards = shard_rows(num_rows, clips_per_shard)
    assert [row for rows in shards for row in rows] == list(range(num_rows))
    assert {len(rows) for rows in shards[:-1]} <= {clips_per_shard}


@pytest.mark.parametrize("part", ["0/3", "4/3", "1", "a/b", "1/0", "-1/3"])
def test_a_part_that_is_none_is_refused(tmp_path: Path, part: str) -> None:
    with pytest.raises(UserError, match="give K/N"):
        config_for(tmp_path, tmp_path, part=part)


@pytest.mark.parametrize("order", [[1, 2, 3], [3, 1, 2]])
def test_parts_in_any_order_give_the_set_of_one_job(media: Path, tmp_path: Path, order: list[int]) -> None:
    config = config_for(media, tmp_path / "parts")
    found = [build_table(replace(config, part=f"{part}/3")) for part in order]
    assert found[:2] == [None, None]
    assert found[2] == build_table(config_for(media, tmp_path / "whole"))
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    # A task that is queued again after all is finished finds nothing to do and says the same.
    assert build_table(replace(config, part="1/3")) == found[2]
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_an_array_of_slurm_tasks_builds_the_set(media: Path, tmp_path: Path) -> None:
    words = [f"table={media}/list.csv", f"out={tmp_path}/out", "dataset=d", "clips_per_shard=2", "sample_rate_hz=16000"]
    script = REPOSITORY / "launch/slurm/build_shards.sbatch"
    for task in (5, 6):
        subprocess.run(
            ["bash", script, "table", *words, "max_failed_share=1"],
            cwd=REPOSITORY,
            env={
                **os.environ,
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "SLURM_ARRAY_TASK_ID": str(task),
                "SLURM_ARRAY_TASK_MIN": "5",
                "SLURM_ARRAY_TASK_COUNT": "2",
                "SLURM_CPUS_PER_TASK": "1",
            },
            check=True,
        )
    build_table(config_for(media, tmp_path / "whole"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_part_does_not_overwrite_the_others(media: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leave one out"):
        config_for(media, tmp_path, part="1/3", mode="overwrite")


def test_a_shard_that_another_job_has_claimed_is_left_to_it(media: Path, tmp_path: Path) -> None:
    config = config_for(media, tmp_path / "out")
    with storage.claimed(str(tmp_path / "out/00001")) as is_ours:
        assert is_ours
        (tmp_path / "out/.00001.tar.theirs.tmp").write_bytes(b"being written")
        assert build_table(config) is None
        assert (tmp_path / "out/.00001.tar.theirs.tmp").exists()
        assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == [
            f"0000{number}.tar" for number in (0, 3, 4)
        ]
    build_table(config)
    build_table(config_for(media, tmp_path / "whole"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_jobs_on_one_set_at_once_share_the_work(media: Path, tmp_path: Path) -> None:
    config = config_for(media, tmp_path / "out", clips_per_shard=1)
    records = list(table.records(config))
    encoded: list[int] = []
    found: list[list[RowReport] | None] = []

    def counted(row: job.Row, **options: object) -> object:
        encoded.append(row.number)
        return encode(row, **options)  # type: ignore[arg-type]

    encode = job._encode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "_encode", counted)
        jobs = [threading.Thread(target=lambda: found.append(build_rows(config, records))) for _ in range(4)]
        for thread in jobs:
            thread.start()
        for thread in jobs:
            thread.join()
    assert sorted(encoded) == list(range(NUM_ROWS))
    assert any(rows is not None for rows in found)
    build_table(config_for(media, tmp_path / "whole", clips_per_shard=1))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_media_that_arrive_later_are_packed_by_retry_failed(media: Path, tmp_path: Path) -> None:
    config = config_for(media, tmp_path / "out")
    build_table(config)
    kept = {name: (tmp_path / "out" / name).stat().st_ino for name in ("00000.tar", "00001.tar", "00004.tar")}
    for row in (4, 7):
        write_sound(media, row)
    build_table(config)
    assert not (tmp_path / "out/00002.tar").exists()
    build_table(replace(config, retry_failed=True))
    build_table(config_for(media, tmp_path / "whole"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in kept} == kept


def remove(name: str, folder: Path) -> None:
    (folder / name).unlink()


def flip(name: str, folder: Path) -> None:
    content = bytearray((folder / name).read_bytes())
    content[700] ^= 1
    (folder / name).write_bytes(content)


def cut(name: str, folder: Path) -> None:
    os.truncate(folder / name, 512)


def put(name: str, folder: Path) -> None:
    (folder / name).write_bytes((folder / "00000.report.parquet").read_bytes())


@pytest.mark.parametrize(
    ("damage", "name", "told"),
    [
        (remove, "00001.tar", r"00001\.tar: the tar is missing"),
        (remove, "00001.index.json", r"00001\.tar: not finished"),
        (remove, "00001.report.parquet", r"00001\.tar: not built"),
        (remove, "00002.report.parquet", r"00002\.tar: not built"),
        (remove, "report.parquet", r"report\.parquet: missing"),
        (remove, "build.json", "no set was begun"),
        (flip, "00003.tar", r"00003\.tar: its SHA-256"),
        (cut, "00003.tar", r"00003\.tar: 512 bytes, not"),
        (put, "00004.report.parquet", r"00004\.tar: its report is of other rows"),
        (put, "report.parquet", r"report\.parquet: not the sum"),
        (put, "shards.parquet", r"shards\.parquet: .*shards\.parquet is no list of shards"),
        (put, "00002.tar", r"00002\.tar: 00002\.tar stands there"),
        (put, "00005.tar", r"00005\.tar: no shard of this row list"),
    ],
)
def test_check_names_what_is_wrong_and_writes_nothing(
    media: Path, tmp_path: Path, damage: object, name: str, told: str
) -> None:
    config = config_for(media, tmp_path / "out")
    rows = build_table(config)
    check = replace(config, mode="check")
    assert build_table(check) == rows
    damage(name, tmp_path / "out")  # type: ignore[operator]
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=told):
        build_table(check)
    assert contents(tmp_path / "out") == before


def test_the_list_is_there_when_every_shard_is_and_gone_before_one_is_built(media: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for part, is_listed in (("1/2", False), ("2/2", True)):
        build_table(config_for(media, out, part=part))
        assert (out / LIST_NAME).exists() is is_listed
    listed = (out / LIST_NAME).read_bytes()
    assert read_list(str(out))["name"].to_pylist() == ["00000.tar", "00001.tar", "00003.tar", "00004.tar"]
    (out / "00001.index.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "_build_shards", lambda *_: pytest.fail("built") if (out / LIST_NAME).exists() else None)
        build_table(config_for(media, out))
    with pytest.raises(UserError, match=r"00001\.tar is not finished"):
        load_shards(str(out))
    build_table(config_for(media, out))
    assert (out / LIST_NAME).read_bytes() == listed


def test_a_list_of_other_indexes_is_found_by_check(media: Path, tmp_path: Path) -> None:
    config = config_for(media, tmp_path / "out")
    build_table(config)
    write_list(config.out, [{**row, "num_samples": 7} for row in list_rows(config.out)])
    with pytest.raises(UserError, match=r"shards\.parquet: not the list of these indexes"):
        build_table(replace(config, mode="check"))


def test_check_of_a_part_looks_at_its_shards_alone(media: Path, tmp_path: Path) -> None:
    config = config_for(media, tmp_path / "out")
    build_table(config)
    flip("00003.tar", tmp_path / "out")
    assert build_table(replace(config, mode="check", part="1/2")) is None
    with pytest.raises(UserError, match="00003"):
        build_table(replace(config, mode="check", part="2/2"))


def run_limited(media: Path, out: Path, file_bytes: int) -> subprocess.CompletedProcess[str]:
    """A build that cannot write files larger than this, as on a disk that runs full."""
    words = [f"table={media}/list.csv", f"out={out}", "dataset=d", "clips_per_shard=2", "sample_rate_hz=16000"]
    return subprocess.run(
        [sys.executable, "-m", "shards.build", "table", *words, "max_failed_share=1", "num_workers=1"],
        cwd=REPOSITORY,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes)),
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_file_that_cannot_grow_is_named_and_the_job_goes_on_later(media: Path, tmp_path: Path) -> None:
    found = run_limited(media, tmp_path / "out", 5000)
    assert found.returncode == 2
    assert found.stderr.splitlines()[-1].startswith(f"error: cannot write {tmp_path}/out/00000.tar (File too large)")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["build.json"]
    build_table(config_for(media, tmp_path / "out"))
    build_table(config_for(media, tmp_path / "whole"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_full_disk_is_named_and_the_job_goes_on_later(media: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    out.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", out], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("no small disk can be mounted here")
    try:
        with pytest.raises(UserError, match=r"cannot write .*\(No space left on device\).*again"):
            build_table(config_for(media, out))
        assert not list(out.glob(".*.tmp"))
        assert (out / "00000.index.json").is_file()
        subprocess.run(["mount", "-o", "remount,size=1m", out], check=True)
        build_table(config_for(media, out))
        build_table(config_for(media, tmp_path / "whole"))
        assert contents(out) == contents(tmp_path / "whole")
    finally:
        subprocess.run(["umount", out], check=True)


def test_lines_for_machines_have_stdout_for_themselves(
    media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"table={media}/list.csv", f"out={tmp_path}/out", "dataset=d", "clips_per_shard=4", "num_workers=0"]
    monkeypatch.setattr(sys, "argv", ["build.py", "table", *words, "max_failed_share=1", "progress=json"])
    main()
    said = capsys.readouterr()
    lines = [json.loads(line) for line in said.out.splitlines()]
    assert [(line["shard"], line["clips"], line["failed"]) for line in lines] == [
        ("00000.tar", 4, 0),
        ("00001.tar", 1, 3),
        ("00002.tar", 2, 0),
    ]
    assert lines[0]["seconds"] == pytest.approx((4 * 1000 + 0 + 1 + 2 + 3) / RATE_HZ, abs=1e-3)
    assert 0 < lines[0]["bytes"] < (tmp_path / "out/00000.tar").stat().st_size
    assert "7 of 10 clips written" in said.err


def dies(record: Record, media: object, dataset: str) -> str:
    if record.name == "3.wav":
        os.kill(os.getpid(), signal.SIGKILL)
    if record.name == "8.wav":
        raise ZeroDivisionError
    return "silent"


def test_a_decoder_that_dies_or_fails_in_a_new_way_costs_its_row(
    media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "_encode", EncodeThatDies())
    rows = build_table(config_for(media, tmp_path / "out", num_workers=2))
    assert rows is not None
    assert [row.reason for row in rows] == ["crashed" if row in (3, 8) else "silent" for row in range(NUM_ROWS)]


class EncodeThatDies:
    """Stands for ``job._encode`` in this process and in the workers, which import this file."""

    def __call__(self, row: job.Row, **options: object) -> object:
        job.try_clip = dies  # type: ignore[assignment]
        return ENCODE(row, **options)  # type: ignore[arg-type]


ENCODE = job._encode
