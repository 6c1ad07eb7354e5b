"""What an evaluation asks of its sets and its metric, told before anything is trained."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Mapping, Sequence

from audiotext_dist import storage
from audiotext_dist.data.bad_samples import BadSampleError
from audiotext_dist.data.decode import decode_metadata
from audiotext_dist.data.sample import METADATA_MEMBER
from audiotext_dist.data.sets import SetConfig
from audiotext_dist.data.shard import Shard
from audiotext_dist.data.shard_reader import ShardReader
from audiotext_dist.errors import UserError
from audiotext_dist.evaluation.benchmarks import check_benchmark
from audiotext_dist.evaluation.metrics import METRICS
from audiotext_dist.evaluation.retrieval import (
    LABEL_RELEVANCE,
    RelevanceLine,
    check_caption_counts,
    check_caption_number,
    direction_names,
    relevance_lines,
)
from audiotext_dist.models.dual_encoder import Task


def check_metric(metric: str, task: Task, sets: Mapping[str, SetConfig]) -> None:
    """Raise ``UserError`` unless an evaluation of these sets gives this metric, as ``report.flat_metrics`` names it."""
    names = [
        f"validation/{set_name}/{direction}/{name}"
        for set_name, chosen in sets.items()
        for direction in direction_names(task, chosen.relevance)
        for name in METRICS
    ]
    if not names:
        raise UserError(
            f"checkpoint.best_metric={metric}, but nothing is evaluated: give data.validation.NAME.shards, or set it "
            "to null"
        )
    if metric not in names:
        nearest = difflib.get_close_matches(metric, names, n=1, cutoff=0)[0]
        raise UserError(
            f"checkpoint.best_metric={metric} is not among the {len(names)} metrics that are evaluated: did you mean "
            f"'{nearest}'?"
        )


def check_sets(task: Task, sets: Mapping[str, SetConfig], opened: Sequence[Sequence[Shard]]) -> None:
    """Raise ``UserError`` where a set cannot be evaluated, as far as it can be told without fetching remote shards."""
    for (name, chosen), shards in zip(sets.items(), opened, strict=True):
        _check_relevance(chosen.relevance, task, name)
        check_benchmark(chosen.benchmark, sum(shard.num_samples for shard in shards), name)
        if task.endswith("-text"):
            _check_captions(chosen.relevance, shards, name)


def _check_relevance(relevance: str | None, task: Task, set_name: str) -> None:
    if relevance is not None and relevance != LABEL_RELEVANCE and not task.endswith("-text"):
        raise UserError(
            f"data.validation.{set_name}.relevance is a file about captions, which task={task} has not: "
            "take the file away, or give relevance=labels"
        )


def _check_captions(relevance: str | None, shards: Sequence[Shard], set_name: str) -> None:
    lines = relevance_lines(relevance)
    for shard in shards:
        if shard.num_captioned is not None and shard.num_captioned < shard.num_samples:
            raise UserError(
                f"data set '{set_name}' has {shard.num_samples - shard.num_captioned} clips without a caption to be "
                f"found by in {storage.public_name(shard.path)}: rebuild it without them"
            )
    if any(storage.is_remote(shard.path) for shard in shards):
        return
    num_captions = _num_captions(shards)
    if num_captions:
        check_caption_counts(num_captions, set_name)
    if lines is not None:
        _check_all_have_relevant(lines, str(relevance), dict(num_captions), set_name)


def _num_captions(shards: Sequence[Shard]) -> list[tuple[str, int]]:
    """Of each clip, by its key, whose metadata can be read; the others are told where they are evaluated."""
    found = []
    with contextlib.closing(ShardReader(shards)) as reader:
        for number, shard in enumerate(shards):
            for row, key in enumerate(shard.index.keys):
                with contextlib.suppress(BadSampleError):
                    found.append((key, len(decode_metadata(reader.read(number, row, METADATA_MEMBER), key).text)))
    return found


def _check_all_have_relevant(
    lines: Sequence[RelevanceLine], path: str, num_captions: Mapping[str, int], set_name: str
) -> None:
    """Every clip is to have a caption that describes it, and every caption a clip."""
    clips: set[str] = set()
    captions: set[tuple[str, int]] = set()
    for line in lines:
        here = [key for key in line["clips"] if key in num_captions]
        known = [pair for pair in line["captions"] if pair[0] in num_captions]
        for key, caption in known:
            check_caption_number(path, key, caption, num_captions[key])
        if here and known:
            clips.update(here)
            captions.update(known)
    without = [f"clip {key}" for key in num_captions if key not in clips]
    without += [
        f"caption {caption} of clip {key}"
        for key, count in num_captions.items()
        for caption in range(count)
        if (key, caption) not in captions
    ]
    if without:
        raise UserError(
            f"{storage.public_name(path)} says of {len(without)} clips and captions of set '{set_name}' nothing that "
            f"they match, {without[0]} the first: give the file that was made with these very shards"
        )
