"""Where a run's numbers go: JSON lines in the run folder, which are the truth, and W&B, which is the view.

W&B goes online when there is a key and a network, offline otherwise; it never asks and never stops a run. Should its
service die or hang, or its disk be full, the run goes on without it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shlex
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import psutil
import wandb

from audiotext_dist import configuration, storage
from audiotext_dist.training.tracker_config import TrackerConfig

METRICS_FILE = "metrics.jsonl"
# So long after a run's end W&B gives up uploading: `wandb sync` can do the rest.
FINISH_SECONDS = 120.0
# And so long after it was told something its service counts as hanging.
ANSWER_SECONDS = FINISH_SECONDS + 60
# Less where a run leaves early: its launcher kills what is left 30 s after the first rank that failed, and a cluster
# that takes its nodes back may wait no longer.
LEAVING_SECONDS = 10.0
_log = logging.getLogger(__name__)


class Tracker:
    """Writes metrics on the main rank; on the others it does nothing. The end of a ``with`` closes it.

    Args:
        start_step: lines of a killed run's steps after this one are cut off.
        wandb_id: the W&B run to go on with, or None for a new one.
    """

    def __init__(
        self,
        config: TrackerConfig,
        run_dir: Path,
        *,
        name: str,
        recipe: Any,
        start_step: int,
        wandb_id: str | None,
        is_main: bool,
    ) -> None:
        self._wandb: Any = None
        self._file: Any = None
        self._wandb_folder = run_dir.resolve() / "wandb"
        self.wandb_id: str | None = wandb_id
        if not is_main:
            return
        path = run_dir / METRICS_FILE
        _cut_after(path, start_step)
        self._file = path.open("ab", buffering=0)
        # W&B's own variable is honoured where the recipe leaves it open.
        mode = os.environ.get("WANDB_MODE", "online") if config.wandb == "auto" else config.wandb
        if mode != "disabled":
            self._wandb = _start_wandb(
                config, run_dir, name=name, recipe=recipe, wandb_id=wandb_id, try_online=mode == "online"
            )
        if self._wandb is not None:
            self.wandb_id = str(self._wandb.id)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # A run that leaves by SystemExit was asked to stop.
        self.close(failed=kind is not None and not issubclass(kind, SystemExit), in_a_hurry=kind is not None)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one line: ``{"trainer/step": step, name: value, ...}``."""
        line = {"trainer/step": step, **metrics}
        if self._file is not None:
            self._write((json.dumps(line) + "\n").encode())
        self._tell_wandb(lambda run: run.log(line))

    def log_examples(self, step: int, name: str, rows: Sequence[Mapping[str, Any]], picture: Path) -> None:
        """Show a table, whose paths are sounds and pictures, and a picture of it; to W&B alone, the files are there."""
        if not rows:
            return
        columns: list[str | int] = list(dict.fromkeys(column for row in rows for column in row))

        def show(run: Any) -> None:
            data = [[_media(row.get(str(column))) for column in columns] for row in rows]
            table = wandb.Table(columns=columns, data=data)
            shown = {f"examples/{name}/queries": table, f"examples/{name}/sheet": _media(picture)}
            run.log({"trainer/step": step, **shown})

        self._tell_wandb(show)

    def _tell_wandb(self, what: Callable[[Any], object], answer_seconds: float = ANSWER_SECONDS) -> None:
        """Do something with the W&B run, if there is one; what goes wrong there is the end of it, not of training."""
        if self._wandb is None:
            return
        # A service that hangs would hold the run for ever; one that is killed fails the call.
        limit = threading.Timer(answer_seconds, _kill_service)
        limit.daemon = True
        limit.start()
        try:
            what(self._wandb)
        # Its service raises what it likes: OSErrors of a lost connection, its own errors, those of a full disk.
        except Exception as error:
            _log.warning("W&B has stopped (%s): %s has every step", _reason(error), METRICS_FILE)
            self._wandb = None
            _end_service()
        finally:
            limit.cancel()

    def _write(self, line: bytes) -> None:
        """A line, or nothing of it: a disk that is full costs lines, not the run."""
        num_bytes = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(num_bytes)
            _log.warning("a line of metrics is lost (%s)", error.strerror)

    def close(self, *, failed: bool = False, in_a_hurry: bool = False) -> None:
        """Finish the files; names the commands that upload what was logged offline, parts that were killed included.

        failed: W&B shows the run so.
        """
        if self._file is None:
            return
        self._file.close()
        # Said first, as a failing rank may be killed while W&B finishes.
        self._name_upload("offline", f"offline-run-*-{self.wandb_id}")
        is_online = self._wandb is not None and self._wandb.settings.mode == "online"
        answer_seconds = LEAVING_SECONDS if in_a_hurry else ANSWER_SECONDS
        self._tell_wandb(lambda run: run.finish(exit_code=int(failed)), answer_seconds)
        if is_online and self._wandb is None:
            self._name_upload("cut off", f"run-*-{self.wandb_id}")

    def _name_upload(self, was: str, folders: str) -> None:
        """Name the commands that upload what lies in these folders, the oldest first, and is not there yet."""
        parts = [part for part in sorted(self._wandb_folder.glob(folders)) if not any(part.glob("*.wandb.synced"))]
        if parts:
            # One command each: a command of several folders ends at the first in which a kill left half a record.
            commands = [f"wandb sync {shlex.quote(str(part))}" for part in parts]
            _log.info("W&B was %s; upload with: %s", was, "; ".join(commands))


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """Every line of a run's metrics."""
    with (run_dir / METRICS_FILE).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _end_service() -> None:
    """After a failure: or its farewell at the process's end would fail in the same way, with a traceback."""
    with contextlib.suppress(Exception):
        wandb.teardown()


def _kill_service() -> None:
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "wandb-core" in process.name():
                process.kill()


def _media(value: Any) -> Any:
    match value:
        case Path(suffix=".flac"):
            return wandb.Audio(str(value))
        case Path():
            return wandb.Image(str(value))
    return value


def _cut_after(path: Path, step: int) -> None:
    """Drop the lines of later steps, and a last line that a kill left unfinished."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["trainer/step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            break
    storage.write_bytes(str(path), "".join(kept).encode())


def _start_wandb(
    config: TrackerConfig,
    run_dir: Path,
    *,
    name: str,
    recipe: Any,
    wandb_id: str | None,
    try_online: bool,
) -> Any:
    def start(mode: Literal["online", "offline"]) -> Any:
        run = wandb.init(
            project=config.project,
            entity=config.entity,
            name=name,
            id=wandb_id,
            resume="allow" if wandb_id else None,
            dir=run_dir,
            config=configuration.to_dict(recipe),
            mode=mode,
            # Were the console W&B's to copy, each line printed after its service has died would fail.
            settings=wandb.Settings(silent=True, console="off", init_timeout=20, finish_timeout=FINISH_SECONDS),
        )
        run.define_metric("*", step_metric="trainer/step")
        return run

    # What waits for an upload lies in the run folder, not in a home that may be small, or on another node.
    os.environ.setdefault("WANDB_DATA_DIR", str(run_dir.resolve() / "wandb"))
    if try_online:
        try:
            # Raises with a key but no network; without a key it only says no.
            if wandb.login(prompt=False):
                return start("online")
        # Here too it raises what it likes: of a disk that is full, of a service that did not start.
        except Exception as error:
            _log.warning("W&B cannot go online (%s): logging offline", _reason(error))
    try:
        return start("offline")
    except Exception as error:
        _log.warning("W&B cannot log (%s): the run goes on with %s alone", _reason(error), METRICS_FILE)
        _end_service()
        return None
