"""What teachers think of a set: ``python launch/correspondences.py shards=FOLDER features=[a,b] out=FOLDER``."""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from audiotext_dist import configuration
from audiotext_dist.data.shard import load_shards
from audiotext_dist.errors import UserError, require_positive, run_for_people
from audiotext_dist.evaluation.correspondence_pairs import find_captions, judge_pairs
from audiotext_dist.evaluation.correspondence_picture import draw_queries
from audiotext_dist.evaluation.correspondences import (
    Batches,
    Judgement,
    Said,
    annotated,
    chance,
    judge,
    read_said,
    truth,
    truth_of_labels,
)
from audiotext_dist.evaluation.retrieval import LABEL_RELEVANCE, read_relevance

PICTURE, RESULTS = "correspondences.png", "correspondences.json"
ALL, CHANCE = "all together", "by chance"
HELP = f"""Look at what the teachers of stage 2 think of a set's clips and captions.

    python launch/correspondences.py shards=corpus/train features=[clip,passt,atst] out=runs/look \\
        relevance=corpus/media-train/relevance.jsonl

Prints, for each teacher and for all together, where the targets' mass goes in a batch; with a relevance file also how
well the cosines tell true pairs from others. Writes {RESULTS} and {PICTURE}, which show for some captions the
clips that all teachers together think nearest, and where the target of the caption's own clip lies in a batch.

"""


@dataclass(frozen=True, kw_only=True)
class LookConfig:
    """What is looked at.

    features: names of what launch/embed.py run=RUN wrote of the shards. folder: where it lies, default beside them.
    relevance: a file that says which captions truly describe which clips, or ``labels``. max_clips: the set's first
    ones. temperature, batch_size: of the targets. num_draws: how often all clips are put into batches, as training
    does it: in a new order, each with one of its captions. queries: captions in the picture, each by its text or as
    KEY:NUMBER, a clip's caption, in quotes: 'queries=["A dog barks.", "clip:0"]'; without them num_queries are drawn.
    top: clips of each. seed: draws captions and batches.
    """

    shards: str = "???"
    features: list[str] = field(default_factory=list)
    out: str = "???"
    folder: str | None = None
    relevance: str | None = None
    max_clips: int = 1000
    temperature: float = 0.05
    batch_size: int = 64
    num_draws: int = 5
    queries: list[str] = field(default_factory=list)
    num_queries: int = 4
    top: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(self, "correspondences", "max_clips", "temperature", "batch_size", "num_draws")
        require_positive(self, "correspondences", "num_queries", "top")
        if not self.features:
            raise UserError("no teachers to look at: give features=[NAME, ...]")


def main() -> None:
    """Read the features, judge them, draw the picture."""
    words = sys.argv[1:]
    if not words or {"-h", "--help"} & set(words):
        keys = inspect.cleandoc(LookConfig.__doc__ or "").partition("\n\n")[2]
        print(f"{HELP}{keys}\n\n{configuration.describe(LookConfig)}")
        return
    config = configuration.parse(LookConfig, words)
    by_labels = config.relevance == LABEL_RELEVANCE
    relevance = None if config.relevance is None or by_labels else read_relevance(config.relevance)
    said = read_said(load_shards(config.shards), config.features, config.folder, config.max_clips)
    true_KC = truth_of_labels(said) if by_labels else None if relevance is None else truth(said, relevance)
    chosen = find_captions(said, config.queries) if config.queries else _draw(said, config)
    batches = Batches(size=config.batch_size, num_draws=config.num_draws, seed=config.seed)
    judgements = _judge_all(said, true_KC, config, batches)
    cosine_KC = said.cosines(config.features)
    pairs = judge_pairs(said, cosine_KC, true_KC, chosen, config.temperature, batches)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    draw_queries(said, cosine_KC, true_KC, chosen, pairs, config.top, out / PICTURE)
    content = {
        "num_clips": len(said.keys),
        "num_captions": len(said.captions),
        "share_annotated": float(annotated(said).mean()),
        "teachers": {name: asdict(judgement) for name, judgement in judgements.items()},
        "pairs": [asdict(pair) for pair in pairs],
    }
    (out / RESULTS).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(_table(judgements, f"{len(said.keys):,} clips and {len(said.captions):,} captions", config))
    print(f"\n{out / PICTURE}")


def _judge_all(
    said: Said, true_KC: NDArray[np.bool_] | None, config: LookConfig, batches: Batches
) -> dict[str, Judgement]:
    """Each teacher, all together, and chance."""
    groups = {name: [name] for name in config.features}
    if len(config.features) > 1:
        groups[ALL] = config.features
    found = {name: judge(said, teachers, true_KC, config.temperature, batches) for name, teachers in groups.items()}
    return found if true_KC is None else {**found, CHANCE: chance(said, true_KC, batches)}


def _draw(said: Said, config: LookConfig) -> list[int]:
    """Captions drawn by the seed."""
    order = np.random.default_rng(config.seed).permutation(len(said.captions))
    return [int(caption) for caption in order[: config.num_queries]]


def _table(judgements: dict[str, Judgement], size: str, config: LookConfig) -> str:
    columns = ["AP over pairs", "AP without own captions", "mass on its caption", "mass on true captions"]
    width = max(map(len, judgements))
    lines = [f"{size}; per cent; masses in batches of {config.batch_size}, temperature {config.temperature:g}"]
    lines.append(" " * width + "".join(f"{column:>24}" for column in columns))
    for name, found in judgements.items():
        values = [found.average_precision, found.average_precision_unannotated, found.mass_annotated, found.mass_true]
        lines.append(f"{name:{width}}" + "".join(f"{_percent(value):>24}" for value in values))
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


if __name__ == "__main__":
    run_for_people(main)
