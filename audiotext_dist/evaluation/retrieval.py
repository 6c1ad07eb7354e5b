"""A model's retrieval on one set: embed each rank's share, gather, rank in both directions.

Clips and captions come with every one of their rows: a fixed crop, the middle frame, all captions. Of a clip's
frames it may be the best one for each pair instead, and all of them under Multiframe Match. The pairs are a clip with
its own frame or captions; with a relevance (labels, or a file of what captions truly describe) the same embeddings
are scored a second time against that.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from audiotext_dist import storage
from audiotext_dist.data.features import Features
from audiotext_dist.data.loader import NO_FEATURES
from audiotext_dist.data.sets import DataConfig, SetConfig
from audiotext_dist.data.shard import Shard
from audiotext_dist.distributed import World, gather_items
from audiotext_dist.errors import UserError
from audiotext_dist.evaluation.benchmarks import Coverage, coverage
from audiotext_dist.evaluation.embedded_clips import EmbeddedClip, EvaluatedFrame, embed_set
from audiotext_dist.evaluation.examples import Example, Rows, choose_examples
from audiotext_dist.evaluation.metrics import chance_metrics, check_retrieval, mean_metrics, metrics_of_queries
from audiotext_dist.models.dual_encoder import DualEncoder, Task

LABEL_RELEVANCE = "labels"
RelevanceLine = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class DirectionResult:
    """One direction's metrics with what chance would give."""

    num_queries: int
    num_items: int
    metrics: dict[str, float]
    chance: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class RetrievalResult:
    """Both directions, by name: ``audio->text`` against own pairs, ``audio->text (labels)`` against a relevance.

    coverage: how much of a published test set this is, where it is one. num_relevance_clips: how many clips the
    relevance file names, of which the set may lack some. examples: queries of the second side.
    """

    set_name: str
    num_clips: int
    coverage: Coverage | None = None
    num_relevance_clips: int | None = None
    directions: dict[str, DirectionResult] = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)


def evaluate_set(
    model: DualEncoder,
    task: Task,
    shards: Sequence[Shard],
    data: DataConfig,
    chosen: SetConfig,
    *,
    set_name: str,
    batch_size: int,
    world: World,
    features: Features = NO_FEATURES,
    num_examples: int = 0,
    frame: EvaluatedFrame = "middle",
    is_asked_to_stop: Callable[[], bool] | None = None,
) -> RetrievalResult:
    """Retrieval in both directions; every rank calls it, and gets the whole result.

    Raises:
        UserError: a clip that cannot be decoded or embedded, a clip without captions, a broken relevance file.
        EvaluationStoppedError: see ``embed_set``.
    """
    clips = embed_set(
        model,
        task,
        shards,
        data,
        batch_size=batch_size,
        world=world,
        features=features,
        frame=frame,
        is_asked_to_stop=is_asked_to_stop,
    )
    check_caption_counts([(clip.key, len(clip.second_RD)) for clip in clips], set_name)
    lines = relevance_lines(chosen.relevance)
    first, second = task.split("-")
    rows = {first: _rows([clip.first_RD for clip in clips]), second: _rows([clip.second_RD for clip in clips])}
    result = RetrievalResult(
        set_name=set_name,
        num_clips=len(clips),
        coverage=coverage(chosen.benchmark, len(clips), sum(len(clip.second_RD) for clip in clips), set_name),
        num_relevance_clips=None if lines is None else len({key for line in lines for key in line["clips"]}),
    )
    for query, item in ((first, second), (second, first)):
        result.directions[f"{query}->{item}"] = _score(
            rows[query], rows[item], _related(rows[query], rows[item]), world
        )
    right = _related(rows[second], rows[first])
    if chosen.relevance is not None:
        name = _relevance_name(chosen.relevance)
        if lines is None:
            related = _relations_of_labels(clips, rows[first], rows[second])
            right = _relations_of_labels(clips, rows[second], rows[first])
        else:
            related = _relations_from_file(lines, chosen.relevance, clips, rows[second])
            right = _invert(related, len(rows[second].clip_R))
        result.directions[f"{first}->{second} ({name})"] = _score(rows[first], rows[second], related, world)
        result.directions[f"{second}->{first} ({name})"] = _score(rows[second], rows[first], right, world)
    keys = [clip.key for clip in clips]
    result.examples.extend(choose_examples(keys, rows[second], rows[first], right, num_examples))
    return result


def direction_names(task: Task, relevance: str | None) -> list[str]:
    """The directions that ``evaluate_set`` gives metrics of."""
    first, second = task.split("-")
    own = [f"{first}->{second}", f"{second}->{first}"]
    return own if relevance is None else [*own, *(f"{name} ({_relevance_name(relevance)})" for name in own)]


def _relevance_name(relevance: str) -> str:
    return "labels" if relevance == LABEL_RELEVANCE else "truth"


def check_caption_counts(num_captions: Sequence[tuple[str, int]], set_name: str) -> None:
    """Raise ``UserError`` unless all clips, given by their keys, have as many captions (or frames)."""
    # Rank-based figures of clips with two captions and of clips with five do not average to anything known.
    (fewer, fewest), (more, most) = (pick(num_captions, key=lambda clip: clip[1]) for pick in (min, max))
    if fewest != most:
        raise UserError(
            f"clip {fewer} of set '{set_name}' has {fewest} captions and {more} has {most}: an evaluation set has as "
            "many for every clip"
        )


def _rows(clips: Sequence[NDArray[np.float32]]) -> Rows:
    counts = [len(rows_RD) for rows_RD in clips]
    return Rows(np.concatenate(clips), np.repeat(np.arange(len(clips)), counts))


def _score(queries: Rows, items: Rows, relevant: Sequence[NDArray[np.int64]], world: World) -> DirectionResult:
    """Each rank ranks the items for its share of the queries."""
    check_retrieval(queries.embeddings_RD, items.embeddings_RD, relevant)
    num_queries, num_items = len(queries.embeddings_RD), len(items.embeddings_RD)
    own = slice(world.rank * num_queries // world.size, (world.rank + 1) * num_queries // world.size)
    metrics_QM = metrics_of_queries(queries.embeddings_RD[own], items.embeddings_RD, relevant[own])
    return DirectionResult(
        num_queries=num_queries,
        num_items=num_items,
        metrics=mean_metrics(np.concatenate(gather_items(metrics_QM))),
        chance=chance_metrics(num_items, relevant),
    )


def _related(queries: Rows, items: Rows) -> list[NDArray[np.int64]]:
    """For each query, the rows of the same clip on the other side."""
    rows_of_clip = _rows_by(items.clip_R.tolist())
    return [rows_of_clip[clip] for clip in queries.clip_R]


def _relations_of_labels(clips: Sequence[EmbeddedClip], first: Rows, second: Rows) -> list[NDArray[np.int64]]:
    """For each row of the first side, the rows of the second whose clip shares a label with its own.

    Clips of the same labels share one array: one for each row would be as large as the scores of all pairs.
    """
    clips_with = defaultdict(list)
    for number, clip in enumerate(clips):
        for label in clip.labels:
            clips_with[label].append(number)
    rows_of_clip = _rows_by(second.clip_R.tolist())
    kinds: list[frozenset[str] | int] = [frozenset(clip.labels) or number for number, clip in enumerate(clips)]
    rows_of_kind: dict[frozenset[str] | int, NDArray[np.int64]] = {}
    for number, kind in enumerate(kinds):
        if kind not in rows_of_kind:
            alike = sorted({other for label in clips[number].labels for other in clips_with[label]}) or [number]
            rows_of_kind[kind] = np.concatenate([rows_of_clip[other] for other in alike])
    return [rows_of_kind[kinds[clip]] for clip in first.clip_R]


def _relations_from_file(
    lines: Sequence[RelevanceLine], path: str, clips: Sequence[EmbeddedClip], captions: Rows
) -> list[NDArray[np.int64]]:
    """For each clip, the caption rows that truly describe it; what is said of clips elsewhere is passed over."""
    number_of = {clip.key: number for number, clip in enumerate(clips)}
    first_row = np.searchsorted(captions.clip_R, np.arange(len(clips) + 1))
    found: list[list[int]] = [[] for _ in clips]
    for line in lines:
        rows = []
        for key, caption in line["captions"]:
            if key in number_of:
                first, after = first_row[number_of[key] : number_of[key] + 2].tolist()
                check_caption_number(path, key, caption, after - first)
                rows.append(first + caption)
        for key in line["clips"]:
            if key in number_of:
                found[number_of[key]] += rows
    return [np.array(sorted(rows), np.int64) for rows in found]


def check_caption_number(path: str, key: str, caption: int, num_captions: int) -> None:
    """Raise ``UserError`` unless a clip has the caption that a relevance file names."""
    if not 0 <= caption < num_captions:
        raise UserError(f"{storage.public_name(path)} names caption {caption} of {key}, which has fewer")


def relevance_lines(relevance: str | None) -> list[RelevanceLine] | None:
    """What a relevance file says; None where a set has no such file."""
    return None if relevance is None or relevance == LABEL_RELEVANCE else read_relevance(relevance)


def read_relevance(path: str) -> list[RelevanceLine]:
    """A relevance file's lines: ``captions``, (clip key, caption number) each, and ``clips``, keys.

    Raises:
        UserError: it is none.
    """
    try:
        lines = [json.loads(line) for line in storage.read_bytes(path).splitlines()]
        for line in lines:
            line["captions"] = [(str(key), int(caption)) for key, caption in line["captions"]]
            line["clips"] = [str(key) for key in line["clips"]]
    except OSError as error:
        raise UserError(
            f"no relevance file at {storage.public_name(path)} ({error.strerror}): check the path"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{storage.public_name(path)} is no relevance file ({error!r}): each line holds "
            '{"captions": [[clip key, caption number], ...], "clips": [clip key, ...]}'
        ) from None
    return lines


def _invert(related: Sequence[NDArray[np.int64]], num_items: int) -> list[NDArray[np.int64]]:
    queries = np.repeat(np.arange(len(related)), [len(items) for items in related])
    rows_of_item = _rows_by(np.concatenate(related).tolist(), queries)
    return [rows_of_item.get(item, np.zeros(0, np.int64)) for item in range(num_items)]


def _rows_by(groups: Sequence[int], rows: NDArray[np.int64] | None = None) -> dict[int, NDArray[np.int64]]:
    """Group number -> its rows, ascending."""
    by_group: dict[int, list[int]] = defaultdict(list)
    for row, group in zip(range(len(groups)) if rows is None else rows, groups, strict=True):
        by_group[group].append(int(row))
    return {group: np.array(members, np.int64) for group, members in by_group.items()}
