"""Read what W&B wrote offline: a log of protobuf records, in blocks as LevelDB's."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_FILE_HEADER, _BLOCK, _HEADER = 7, 32768, struct.Struct("<IHB")
_FULL, _LAST = 1, 4


def history(run_dir: Path) -> list[dict[str, Any]]:
    """Every line that was logged, name -> value, of a run folder's one offline run."""
    lines = []
    for record in _records(run_dir):
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            lines.append({name: json.loads(value) for name, value in items.items()})
    return lines


def exit_code(run_dir: Path) -> int:
    """With which a run folder's one offline run ended."""
    (code,) = (record.exit.exit_code for record in _records(run_dir) if record.WhichOneof("record_type") == "exit")
    return int(code)


def _records(run_dir: Path) -> list[Any]:
    (file,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    return [wandb_internal_pb2.Record.FromString(content) for content in _contents(file.read_bytes())]


def _contents(log: bytes) -> Iterator[bytes]:
    place, parts = _FILE_HEADER, []
    while place + _HEADER.size <= len(log):
        if _BLOCK - place % _BLOCK < _HEADER.size:
            place += _BLOCK - place % _BLOCK
            continue
        _, num_bytes, kind = _HEADER.unpack_from(log, place)
        place += _HEADER.size
        parts.append(log[place : place + num_bytes])
        place += num_bytes
        if kind in (_FULL, _LAST):
            yield b"".join(parts)
            parts = []
