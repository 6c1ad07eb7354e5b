"""A few queries of a set, always the same ones, and what the model finds for them.

1. ``choose_examples`` takes the clips whose hashed keys are lowest: the same at every evaluation, after a resume, and
   for every number of ranks. A caption (or frame) of each is the query; clips are found.
2. ``write_examples``, on the main rank alone, reads those clips and the found ones from their shards, and leaves a
   table with sounds and pictures in the run folder; it returns the same as rows for a tracker.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
from numpy.typing import NDArray
from PIL import Image

from audiotext_dist.data.bad_samples import BadSampleError
from audiotext_dist.data.decode import decode_metadata, square_frame
from audiotext_dist.data.sample import AUDIO_MEMBER, METADATA_MEMBER, frame_member, safe_key
from audiotext_dist.data.sets import DataConfig
from audiotext_dist.data.shard import Shard
from audiotext_dist.data.shard_reader import ShardReader
from audiotext_dist.errors import UserError
from audiotext_dist.evaluation.metrics import pair_scores
from audiotext_dist.evaluation.sheet import FOUND_SIZE, OWN_SIZE, FoundCell, SheetRow, draw_sheet
from audiotext_dist.evaluation.spectrogram import read_flac, spectrogram, spectrogram_with_axes

EXAMPLES_FOLDER, TABLE_FILE, SHEET_FILE = "examples", "queries.json", "queries.png"
NUM_FOUND = 5
_FRAME_PIXELS = 224
_NOTHING = Image.new("RGB", FOUND_SIZE, (225, 225, 225))
_log = logging.getLogger(__name__)


class Rows(NamedTuple):
    """One side of a set: every row's embedding, and the number of the clip that it belongs to."""

    embeddings_RD: NDArray[np.float32]
    clip_R: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Found:
    """One found clip: its key, its score, and whether it is right."""

    clip: str
    score: float
    is_right: bool


@dataclass(frozen=True, kw_only=True)
class Example:
    """One query: a clip's key, which of its captions (or frames), the rank of the first right clip, the top five."""

    clip: str
    number: int
    rank: int
    found: list[Found]


def choose_examples(
    keys: Sequence[str], queries: Rows, items: Rows, right: Sequence[NDArray[np.int64]], num_examples: int
) -> list[Example]:
    """At most so many queries, each of another clip.

    Args:
        keys: of the clips, by number.
        right: for each query, the items that it should find.
    """
    examples = []
    for clip in sorted(range(len(keys)), key=lambda number: _hash(keys[number]))[:num_examples]:
        own_rows = np.flatnonzero(queries.clip_R == clip)
        number = _hash(keys[clip]) % len(own_rows)
        row = own_rows[number]
        scores_R = pair_scores(queries.embeddings_RD[[row]], items.embeddings_RD)[0]
        is_right_R = np.isin(np.arange(len(scores_R)), right[row])
        # As the metrics have it, what is wrong comes first among equals.
        order = np.lexsort((is_right_R, -scores_R))
        # A clip with several items stands where its best one does.
        _, first = np.unique(items.clip_R[order], return_index=True)
        order = order[np.sort(first)]
        found = [
            Found(clip=keys[items.clip_R[item]], score=float(scores_R[item]), is_right=bool(is_right_R[item]))
            for item in order[:NUM_FOUND]
        ]
        rank = int(np.flatnonzero(is_right_R[order])[0]) + 1
        examples.append(Example(clip=keys[clip], number=number, rank=rank, found=found))
    return examples


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest())


@dataclass(frozen=True, kw_only=True)
class _ShownClip:
    """What people see of a clip: its sound where the task has one, else its frame. waveform_S: of queries alone."""

    text: str
    captions: list[str]
    small: Image.Image
    frame: Image.Image | None
    waveform_S: NDArray[np.float32] | None


def write_examples(
    examples: Sequence[Example], task: str, set_name: str, shards: Sequence[Shard], data: DataConfig, run_dir: Path
) -> list[dict[str, Any]]:
    """Write ``examples/SET/``: ``queries.png`` and ``queries.json``, and sound and pictures of each query's clip.

    Returns:
        A row a query: text, numbers, and paths of what is to be seen or heard. Empty where the disk refuses them, or
        a shard cannot be read: a run does not end of that.
    """
    if not examples:
        return []
    folder = run_dir / EXAMPLES_FOLDER / set_name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        clips = _read_clips(examples, task, shards, data)
        lines = [asdict(example) | {"query": _query(example, task, clips)} for example in examples]
        (folder / TABLE_FILE).write_text(json.dumps(lines, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        _draw(examples, task, set_name, clips, data.sample_rate_hz).save(folder / SHEET_FILE, optimize=True)
        return [_table_row(example, task, clips, data.sample_rate_hz, folder) for example in examples]
    except (OSError, UserError) as error:
        _log.warning("the examples of %s are not written (%s)", set_name, error)
        return []


def _read_clips(
    examples: Sequence[Example], task: str, shards: Sequence[Shard], data: DataConfig
) -> dict[str, _ShownClip]:
    queries = {example.clip for example in examples}
    keys = queries | {found.clip for example in examples for found in example.found}
    # Shard after shard, so that the cache holds each for as long as it is read.
    places = [
        (number, row, key)
        for number, shard in enumerate(shards)
        for row, key in enumerate(shard.index.keys)
        if key in keys
    ]
    with contextlib.closing(ShardReader(shards, data.node_cache(), verify=data.verify)) as reader:
        return {
            key: _read_clip(reader, number, row, key, task, data, is_query=key in queries)
            for number, row, key in places
        }


def _read_clip(
    reader: ShardReader, shard: int, row: int, key: str, task: str, data: DataConfig, *, is_query: bool
) -> _ShownClip:
    captions, waveform_S, frame = list[str](), None, None
    # A model that reads features meets no member itself: a broken one is not shown, and no more.
    with contextlib.suppress(BadSampleError):
        captions = decode_metadata(reader.read(shard, row, METADATA_MEMBER), key).text
    if "audio" in task:
        with contextlib.suppress(BadSampleError, soundfile.LibsndfileError):
            waveform_S = read_flac(reader.read(shard, row, AUDIO_MEMBER), data.clip_seconds)
    if "image" in task:
        with contextlib.suppress(BadSampleError):
            jpeg = reader.read(shard, row, frame_member(data.num_frames // 2))
            frame = Image.fromarray(square_frame(jpeg, _FRAME_PIXELS))
    if waveform_S is not None:
        small = spectrogram(waveform_S, data.sample_rate_hz, *FOUND_SIZE)
    else:
        small = _NOTHING if frame is None else frame.resize((FOUND_SIZE[1], FOUND_SIZE[1]))
    return _ShownClip(
        text=captions[0] if captions else key,
        captions=captions,
        small=small,
        frame=frame,
        # Those of all the found clips would fill some hundred MB.
        waveform_S=waveform_S if is_query else None,
    )


def _query(example: Example, task: str, clips: Mapping[str, _ShownClip]) -> str:
    """The caption that asks, or the name of the clip whose frame does."""
    captions = clips[example.clip].captions
    return captions[example.number] if task.endswith("text") and captions else example.clip


def _draw(
    examples: Sequence[Example], task: str, set_name: str, clips: Mapping[str, _ShownClip], sample_rate_hz: int
) -> Image.Image:
    items, queries = task.split("-")
    rows = []
    for example in examples:
        clip, own = clips[example.clip], clips[example.clip].small
        if clip.waveform_S is not None:
            own = spectrogram_with_axes(clip.waveform_S, sample_rate_hz, *OWN_SIZE)
        found = [
            FoundCell(text=clips[one.clip].text, score=one.score, is_right=one.is_right, picture=clips[one.clip].small)
            for one in example.found
        ]
        frame = clip.frame if queries == "image" else None
        query = _query(example, task, clips)
        rows.append(SheetRow(query=query, query_frame=frame, rank=example.rank, own=own, found=found))
    title = f"{set_name}: {queries} to {items}, {len(rows)} fixed queries and their top {NUM_FOUND}"
    sheet = draw_sheet(title, f"its own {items}", rows, has_sound=items == "audio")
    # 256 colours, a third of the bytes.
    return sheet.quantize(256)


def _table_row(
    example: Example, task: str, clips: Mapping[str, _ShownClip], sample_rate_hz: int, folder: Path
) -> dict[str, Any]:
    """Sound and pictures are written once: they are the same at every evaluation."""
    clip, stem = clips[example.clip], folder / safe_key(example.clip)
    row: dict[str, Any] = {"clip": example.clip, "query": _query(example, task, clips)}
    if clip.frame is not None:
        row["frame"] = stem.with_suffix(".jpg")
        if not row["frame"].exists():
            clip.frame.save(row["frame"])
    if clip.waveform_S is not None:
        row |= {"audio": stem.with_suffix(".flac"), "spectrogram": stem.with_suffix(".png")}
        if not row["spectrogram"].exists():
            soundfile.write(row["audio"], clip.waveform_S, sample_rate_hz, "PCM_16")
            picture = spectrogram_with_axes(clip.waveform_S, sample_rate_hz, 480, 200, text_size=12)
            picture.quantize(256).save(row["spectrogram"])
    row["rank of a right one"] = example.rank
    for place, found in enumerate(example.found, start=1):
        mark = "right" if found.is_right else "wrong"
        row[f"top {place}"] = f"{mark} {found.score:.3f} {clips[found.clip].text} [{found.clip}]"
    return row
