"""What stays of a run's checkpoints: the last, the best, on a full disk, and in a store."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import fsspec
import pytest
from torch import nn

from audiotext_dist.distributed import World
from audiotext_dist.errors import UserError
from audiotext_dist.training import checkpoint, checkpoint_folder, saving, weights
from audiotext_dist.training.saving import CheckpointConfig, Saver
from tests.object_store import Request, objects, proxy, server, use
from tests.training.test_checkpoint import START, StateEngine

REPOSITORY = Path(__file__).parents[2]


def saver_of(run_dir: Path, model: nn.Module | None = None, **config: object) -> Saver:
    model = nn.Linear(3, 2) if model is None else model
    given = CheckpointConfig(**{"keep_last": 1, **config})  # type: ignore[arg-type]
    return Saver(given, StateEngine(), model, run_dir, World(), "name: test\n")  # type: ignore[arg-type]


def at(step: int) -> checkpoint.Progress:
    return dataclasses.replace(START, step=step)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("*") if path.is_dir())


@pytest.mark.parametrize(("best_is", "best_step"), [("highest", 3), ("lowest", 2)])
def test_the_best_one_stays_until_a_better_one_comes(tmp_path: Path, best_is: str, best_step: int) -> None:
    saver = saver_of(tmp_path, best_metric="recall", best_is=best_is)
    for step, recall in [(1, 0.2), (2, 0.1), (3, 0.5), (4, 0.5), (5, 0.3), (6, 0.3)]:
        assert saver.save(at(step))
        saver.note_metrics(step, {"recall": recall, "other": 1.0})
    assert names(tmp_path) == [f"step-0000000{best_step}", "step-00000006"]
    assert json.loads((tmp_path / "checkpoints" / "best.json").read_text())["name"] == f"step-0000000{best_step}"


@pytest.mark.parametrize("best_is", ["highest", "lowest"])
def test_a_metric_that_is_no_number_is_never_the_best(tmp_path: Path, best_is: str) -> None:
    best, saver = tmp_path / "checkpoints" / "best.json", saver_of(tmp_path, best_metric="recall", best_is=best_is)
    found = []
    for step, recall in [(1, math.nan), (2, 0.5), (3, math.nan)]:
        assert saver.save(at(step))
        saver.note_metrics(step, {"recall": recall})
        found.append(json.loads(best.read_text())["name"] if best.is_file() else None)
    assert found == [None, "step-00000002", "step-00000002"]
    # One that an older version took for the best gives way.
    best.write_text(json.dumps({"name": "step-00000003", "metric": "recall", "value": math.nan}))
    saver.save(at(4))
    saver.note_metrics(4, {"recall": 0.1})
    assert json.loads(best.read_text())["name"] == "step-00000004"


def test_the_best_one_can_be_named_in_place_of_its_folder(tmp_path: Path) -> None:
    saver = saver_of(tmp_path, model := nn.Linear(3, 2), best_metric="recall")
    best = tmp_path / "checkpoints" / "best"
    with pytest.raises(UserError, match=r"no best checkpoint at .*: train with checkpoint.best_metric"):
        weights.read_weights(str(best))
    for step, recall in [(1, 0.1), (2, 0.5), (3, 0.2)]:
        nn.init.constant_(model.bias, step)
        saver.save(at(step))
        saver.note_metrics(step, {"recall": recall})
    assert weights.read_weights(str(best))["bias"].tolist() == [2, 2]
    assert weights.read_weights(str(tmp_path))["bias"].tolist() == [3, 3]
    assert {checkpoint_folder.run_folder(path) for path in (best, tmp_path, best.with_name("step-00000003"))} == {
        tmp_path
    }


def test_a_best_one_that_cannot_be_written_down_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saver = saver_of(tmp_path, best_metric="recall")
    (tmp_path / "checkpoints" / "best.json").mkdir(parents=True)
    saver.save(at(1))
    saver.note_metrics(1, {"recall": 1.0})
    assert "step 1 is not remembered as the best" in caplog.text


ON_A_FULL_DISK = """
import os, sys
from pathlib import Path
from torch import nn
from audiotext_dist.training.tracker import Tracker, TrackerConfig
from tests.training.test_saving import at, names, saver_of

disk = Path(sys.argv[1])
saver = saver_of(disk, nn.Linear(256, 256), keep_last=2)
config = TrackerConfig(wandb="disabled")
tracker = Tracker(config, disk, name="t", recipe={}, start_step=0, wandb_id=None, is_main=True)
saver.save(at(1))
for left_bytes in map(int, sys.argv[2:]):
    with (disk / "other").open("wb", buffering=0) as other:
        try:
            while True:
                other.write(bytes(4096))
        except OSError as error:
            print(error.strerror)
        other.truncate(other.tell() - left_bytes)
    print(saver.save(at(2)), names(disk))
    tracker.log(2, {"train/loss": 2.0, "long": "x" * 400000})
    (disk / "other").unlink()
    tracker.log(3, {"train/loss": 3.0})
print(saver.save(at(3)), names(disk))
print((disk / "metrics.jsonl").read_text())
"""


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path: Path) -> None:
    places = [0, 100_000, 280_000]  # full at once, within the weights, after them
    script = tmp_path / "script.py"
    script.write_text(ON_A_FULL_DISK)
    disk = tmp_path / "disk"
    disk.mkdir()
    run = f"{sys.executable} {script} {disk} {' '.join(map(str, places))}"
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", f"mount -t tmpfs -o size=1m x {disk} && {run}"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    if "unshare:" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no small disk can be made here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:6] == ["No space left on device", "False ['step-00000001']"] * 3
    assert lines[6] == "True ['step-00000001', 'step-00000003']"
    assert done.stderr.count("no checkpoint of step 2") == 3
    assert [json.loads(line)["trainer/step"] for line in lines[7:] if line] == [3, 3, 3]


@pytest.mark.parametrize("unsynced", ["model.safetensors", "progress.json", ".step-00000002.partial", "checkpoints"])
def test_what_the_disk_does_not_have_for_sure_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, unsynced: str
) -> None:
    """A network disk may tell of its being full only here, and a power loss undoes what was not synced."""

    def fsync(descriptor: int, code: int = errno.EIO) -> None:
        if unsynced in Path(f"/proc/self/fd/{descriptor}").readlink().name:
            raise OSError(code, os.strerror(code))

    saver = saver_of(tmp_path)
    assert saver.save(at(1))
    monkeypatch.setattr(os, "fsync", fsync)
    assert not saver.save(at(2))
    assert "no checkpoint of step 2" in caplog.text
    assert [path.name for path in (tmp_path / "checkpoints").glob("*step-*")] == ["step-00000001"]
    # Some network disks cannot sync folders at all.
    monkeypatch.setattr(os, "fsync", lambda descriptor: fsync(descriptor, errno.EINVAL))
    assert saver.save(at(2)) == (not unsynced.endswith(("safetensors", "json")))


def test_copies_in_a_store_bring_a_run_back_on_an_empty_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refuse = refuse_reading = False

    def fault(request: Request) -> str | None:
        if refuse_reading and request.method == "GET" and "model.safetensors" in request.path:
            return "403"
        return "403" if refuse and request.method == "PUT" else None

    with server() as endpoint, proxy(endpoint, fault) as address:  # type: ignore[arg-type]
        use(monkeypatch, address)
        fsspec.filesystem("s3").mkdir("runs")
        config = {"upload_to": "s3://runs/mine", "keep_last": 2}
        saver = saver_of(tmp_path / "first", **config)
        for step in (1, 2, 3):
            assert saver.save(at(step))
            saver.finish()
        assert sorted({name.split("/")[1] for name in objects(endpoint, "runs")}) == ["step-00000002", "step-00000003"]
        refuse = True
        assert saver.save(at(4))
        saver.finish()
        assert "step-00000004 is not copied to s3://runs/mine" in caplog.text
        refuse = False

        # One that came to no end has no manifest, and is passed over.
        fsspec.filesystem("s3").pipe_file("runs/mine/step-00000009/model.safetensors", b"half")
        empty = tmp_path / "second"
        # One that is refused is not passed over: the run would begin anew.
        refuse_reading = True
        with pytest.raises(UserError, match=r"upload_to cannot be read .*model\.safetensors"):
            saving.fetch(CheckpointConfig(**config), empty, World())  # type: ignore[arg-type]
        refuse_reading = False
        fetched = saving.fetch(CheckpointConfig(**config), empty, World())  # type: ignore[arg-type]
        assert fetched is not None
        assert checkpoint.find_newest_whole(empty, World()) == fetched == empty / "checkpoints" / "step-00000003"
        for file in fetched.iterdir():
            assert file.read_bytes() == (tmp_path / "first" / "checkpoints" / fetched.name / file.name).read_bytes()
        # What the disk has is not fetched again; and a store that cannot be read stops the run.
        assert saving.fetch(CheckpointConfig(**config), empty, World()) is None  # type: ignore[arg-type]
        assert names(tmp_path / "first") == ["step-00000003", "step-00000004"]
    use(monkeypatch, "http://127.0.0.1:1")
    with pytest.raises(UserError, match=r"checkpoint\.upload_to cannot be read"):
        saving.fetch(CheckpointConfig(**config), tmp_path / "third", World())  # type: ignore[arg-type]


def test_a_damaged_copy_gives_way_to_the_one_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with server() as endpoint:
        use(monkeypatch, endpoint)
        store = fsspec.filesystem("s3")
        store.mkdir("damaged")
        config = CheckpointConfig(upload_to="s3://damaged/mine", keep_last=3)
        saver = saver_of(tmp_path / "first", upload_to=config.upload_to, keep_last=3)
        for step in (1, 2, 3):
            assert saver.save(at(step))
            saver.finish()
        store.rm_file("damaged/mine/step-00000003/optimizer.safetensors")
        model = store.cat_file("damaged/mine/step-00000002/model.safetensors")
        store.pipe_file("damaged/mine/step-00000002/model.safetensors", bytes([*model[:-1], model[-1] ^ 1]))
        fetched = saving.fetch(config, tmp_path / "second", World())
        assert fetched == checkpoint.find_newest_whole(tmp_path / "second", World())
        assert names(tmp_path / "second") == ["step-00000001"]
        assert all(f"step-0000000{step} at s3://damaged/mine is damaged" in caplog.text for step in (3, 2))
        # With none left a run would begin anew; with a whole one on the disk it goes on from that.
        store.pipe_file("damaged/mine/step-00000001/manifest.json", b"7")
        with pytest.raises(UserError, match=r"none of the copies at s3://damaged/mine is whole"):
            saving.fetch(config, tmp_path / "third", World())
        assert saving.fetch(config, tmp_path / "second", World()) is None


def test_a_copy_that_is_replaced_is_invisible_until_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse = False

    def fault(request: Request) -> str | None:
        return "403" if refuse and request.method == "PUT" and "model.safetensors" in request.path else None

    with server() as endpoint, proxy(endpoint, fault) as address:  # type: ignore[arg-type]
        use(monkeypatch, address)
        fsspec.filesystem("s3").mkdir("replaced")
        saver = saver_of(tmp_path, upload_to="s3://replaced/mine")
        assert saver.save(at(1))
        saver.finish()
        refuse = True
        assert saver.save(at(1))
        saver.finish()
        left = {name.rpartition("/")[2] for name in objects(endpoint, "replaced")}
        assert "model.safetensors" in left
        assert "manifest.json" not in left


def test_the_best_one_comes_back_from_a_store_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with server() as endpoint:
        use(monkeypatch, endpoint)
        fsspec.filesystem("s3").mkdir("best")
        config = {"upload_to": "s3://best/mine", "best_metric": "recall", "keep_last": 1}
        saver = saver_of(tmp_path / "first", **config)
        for step, recall in [(1, 0.1), (2, 0.5), (3, 0.2)]:
            assert saver.save(at(step))
            saver.note_metrics(step, {"recall": recall})
            saver.finish()
        empty = tmp_path / "second"
        saving.fetch(CheckpointConfig(**config), empty, World())  # type: ignore[arg-type]
        assert names(empty) == ["step-00000002", "step-00000003"]
        best = checkpoint_folder.best_of(empty)
        assert best is not None
        assert (best["name"], best["value"]) == ("step-00000002", 0.5)
        saver = saver_of(empty, **config)
        assert saver.save(at(4))
        saver.finish()
        assert {name.split("/")[1] for name in objects(endpoint, "best")} == {"step-00000002", "step-00000004"}


def test_a_copy_that_lags_behind_takes_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with server() as endpoint:
        use(monkeypatch, endpoint)
        fsspec.filesystem("s3").mkdir("lagging")
        saver = saver_of(tmp_path, upload_to="s3://lagging/mine")
        for step in range(1, 8):
            saver.save(at(step))
        saver.finish()
        assert {name.split("/")[1] for name in objects(endpoint, "lagging")} == {"step-00000007"}
    assert names(tmp_path) == ["step-00000007"]


def test_training_does_not_wait_while_a_store_takes_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began, may_go_on = threading.Event(), threading.Event()

    def hold(request: Request) -> None:
        if request.method == "PUT" and "/step-" in request.path:
            put.add(request.path.split("/")[3])
            began.set()
            # Not for ever: a save that waits for it is to fail, not to hang.
            may_go_on.wait(30)
            may_go_on.set()

    put: set[str] = set()
    with server() as endpoint, proxy(endpoint, hold) as address:
        use(monkeypatch, address)
        fsspec.filesystem("s3").mkdir("slow")
        saver = saver_of(tmp_path, upload_to="s3://slow/mine", keep_last=3)
        assert saver.save(at(1))
        assert began.wait(30)
        assert saver.save(at(2))
        assert saver.save(at(3))
        assert objects(endpoint, "slow") == {}
        may_go_on.set()
        saver.finish()
        assert {name.split("/")[1] for name in objects(endpoint, "slow")} == {"step-00000001", "step-00000003"}
    # While the first one was on its way, the third took the second one's turn.
    assert put == {"step-00000001", "step-00000003"}


def test_a_disk_without_links_costs_the_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    saver = saver_of(tmp_path, upload_to="s3://nowhere/mine")
    assert saver.save(at(1))
    saver.finish()
    assert "step-00000001 is not copied to s3://nowhere/mine" in caplog.text
    assert names(tmp_path) == ["step-00000001"]


def test_where_copies_go_is_a_url_without_secrets() -> None:
    with pytest.raises(UserError, match="upload_to=/tmp/here is no URL"):
        CheckpointConfig(upload_to="/tmp/here")
    with pytest.raises(UserError, match="is given with credentials"):
        CheckpointConfig(upload_to="s3://key:secret@bucket/x")
