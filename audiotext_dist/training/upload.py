"""Copies of checkpoints where a lost disk does not reach: ``checkpoint.upload_to=s3://bucket/run``.

A thread of the main rank copies the newest finished checkpoint, its manifest last: without one a copy is invisible,
as a half-written checkpoint is on the disk. Training never waits for it, but at the end. What the store refuses is a
warning, and the next checkpoint is tried as ever.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
from pathlib import Path

from audiotext_dist import storage
from audiotext_dist.distributed import World
from audiotext_dist.errors import UserError
from audiotext_dist.training.checkpoint_folder import BEST_FILE, MANIFEST, is_whole

_log = logging.getLogger(__name__)
_STAGED = ".upload-"


class Uploader:
    """Copies finished checkpoints to ``target``, one at a time; of several that wait, the newest.

    Beside its files each copy holds the name of the best checkpoint so far.
    """

    def __init__(self, target: str, folder: Path) -> None:
        self._target, self._folder = target, folder
        self._changed = threading.Condition()
        self._waiting: tuple[Path, set[str]] | None = None
        self._busy = False
        for left in folder.glob(f"{_STAGED}*"):
            shutil.rmtree(left)
        threading.Thread(target=self._work, daemon=True).start()

    def put(self, checkpoint: Path, keep: set[str]) -> None:
        """Copy a checkpoint soon; afterwards only the names in ``keep`` stay at the target."""
        staged = self._folder / f"{_STAGED}{checkpoint.name}"
        shutil.rmtree(staged, ignore_errors=True)
        try:
            staged.mkdir()
            # Links cost no space, and live on when the run removes the checkpoint.
            best = self._folder / BEST_FILE
            for file in [*checkpoint.iterdir(), *([best] if best.is_file() else [])]:
                os.link(file, staged / file.name)
        except OSError as error:
            _log.warning("%s is not copied to %s (%s): the run goes on", checkpoint.name, self._target, error)
            shutil.rmtree(staged, ignore_errors=True)
            return
        with self._changed:
            if self._waiting is not None:
                shutil.rmtree(self._waiting[0])
            self._waiting = (staged, keep)
            self._changed.notify_all()

    def finish(self, timeout_seconds: float) -> bool:
        """Wait until everything is copied; False where that takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: self._waiting is None and not self._busy, timeout_seconds)

    def _work(self) -> None:
        while True:
            with self._changed:
                while self._waiting is None:
                    self._changed.wait()
                (staged, keep), self._waiting, self._busy = self._waiting, None, True
            try:
                self._copy(staged, keep)
            # Whatever a store's library raises: were this thread to end, the run would wait for it.
            except Exception as error:
                _log.warning("%s is not copied to %s (%s): the run goes on", staged.name, self._target, error)
            shutil.rmtree(staged, ignore_errors=True)
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _copy(self, staged: Path, keep: set[str]) -> None:
        name = staged.name.removeprefix(_STAGED)
        # What makes it whole goes first where an earlier copy has this name, and comes last.
        storage.remove(storage.join(self._target, f"{name}/{MANIFEST}"), missing_ok=True)
        for file in sorted(staged.iterdir(), key=lambda file: file.name == MANIFEST):
            storage.copy(str(file), storage.join(self._target, f"{name}/{file.name}"))
        for old in remote_names(self._target):
            if old not in keep | {name}:
                # First what makes it whole.
                storage.remove(storage.join(self._target, f"{old}/{MANIFEST}"), missing_ok=True)
                for path in storage.list_files(storage.join(self._target, old), ""):
                    storage.remove(path, missing_ok=True)


def remote_names(target: str) -> list[str]:
    """The checkpoints at the target, whole or not, newest first."""
    names = [path.rstrip("/").rpartition("/")[2] for path in storage.list_files(target, "")]
    return sorted((name for name in names if name.startswith("step-")), reverse=True)


def fetch_newest(target: str, folder: Path, newer_than: str) -> Path | None:
    """Bring the newest whole checkpoint of the target into the folder, if it is newer than the one named, and the
    one that was the best when that was copied.

    Raises:
        UserError: the store cannot be read, or all it has is damaged; starting anew would throw the run away.
    """
    newer = [name for name in remote_names(target) if name > newer_than]
    finished = [name for name in newer if storage.exists(storage.join(target, f"{name}/{MANIFEST}"))]
    for name in finished:
        if _fetch(target, folder, name):
            _fetch_best(target, folder, name)
            return folder / name
    if finished and not newer_than:
        raise UserError(f"none of the copies at {storage.public_name(target)} is whole")
    return None


def _fetch(target: str, folder: Path, name: str) -> bool:
    """Bring one checkpoint; False, with a warning, where it is not whole."""
    partial = folder / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    # Not every ValueError: what a store refuses is one too, and must be told.
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError, TypeError):
        content = storage.read_bytes(storage.join(target, f"{name}/{MANIFEST}"))
        for file in json.loads(content):
            storage.copy(storage.join(target, f"{name}/{file}"), str(partial / file))
        (partial / MANIFEST).write_bytes(content)
    if not is_whole(partial, World()):
        _log.warning("%s at %s is damaged: it is passed over", name, storage.public_name(target))
        shutil.rmtree(partial)
        return False
    shutil.rmtree(folder / name, ignore_errors=True)
    partial.rename(folder / name)
    return True


def _fetch_best(target: str, folder: Path, newest: str) -> None:
    """Bring the checkpoint that the copy of the newest one names as the best, if it is still there."""
    try:
        content = storage.read_bytes(storage.join(target, f"{newest}/{BEST_FILE}"))
        best = str(json.loads(content)["name"])
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        return
    if (folder / best).is_dir() or (best in remote_names(target) and _fetch(target, folder, best)):
        storage.write_bytes(str(folder / BEST_FILE), content)
