"""Single pairs of a clip and its caption: which captions of a batch get how much of the clip's target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from audiotext_dist.errors import UserError
from audiotext_dist.evaluation.correspondences import Batches, Said, drawn_captions, softmax

NUM_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class CaptionMass:
    """A caption with its share of a clip's target; is_true: it truly describes the clip, None where nobody knows."""

    caption: str
    clip: str
    mass: float
    is_annotated: bool
    is_true: bool | None


@dataclass(frozen=True, kw_only=True)
class PairJudgement:
    """A clip's target in a batch: the share on its own caption, on all true ones, and the captions with most of it."""

    clip: str
    caption: str
    mass_annotated: float
    mass_true: float | None
    most_mass: list[CaptionMass]


def find_captions(said: Said, queries: Sequence[str]) -> list[int]:
    """The captions of these names, each a caption's text (the first of it) or ``KEY:NUMBER``, a clip's caption.

    Raises:
        UserError: there is no such caption.
    """
    by_name = {text: place for place, text in reversed(list(enumerate(said.captions)))}
    for place, (clip, number) in enumerate(zip(said.clip_C, said.number_C, strict=True)):
        by_name[f"{said.keys[clip]}:{number}"] = place
    for query in queries:
        if query not in by_name:
            raise UserError(
                f"no caption '{query}' among these {len(said.keys):,} clips: name it by its text or as "
                f"KEY:NUMBER ({said.keys[0]}:0), or read more of the set with max_clips="
            )
    return [by_name[query] for query in queries]


def judge_pairs(
    said: Said,
    cosine_KC: NDArray[np.float32],
    true_KC: NDArray[np.bool_] | None,
    captions: Sequence[int],
    temperature: float,
    batches: Batches,
) -> list[PairJudgement]:
    """The target of each caption's own clip in a batch of that caption and other clips', drawn by the batches' seed."""
    return [_judge_pair(said, cosine_KC, true_KC, caption, temperature, batches) for caption in captions]


def _judge_pair(
    said: Said,
    cosine_KC: NDArray[np.float32],
    true_KC: NDArray[np.bool_] | None,
    caption: int,
    temperature: float,
    batches: Batches,
) -> PairJudgement:
    clip = int(said.clip_C[caption])
    captions_B = np.array([caption, *_captions_of_others(said, clip, batches.size - 1, batches.seed)])
    mass_B = softmax(cosine_KC[[clip]][:, captions_B] / temperature)[0]
    is_true_B = None if true_KC is None else true_KC[clip, captions_B]
    most_mass = [
        CaptionMass(
            caption=said.captions[captions_B[place]],
            clip=said.keys[said.clip_C[captions_B[place]]],
            mass=float(mass_B[place]),
            is_annotated=bool(place == 0),
            is_true=None if is_true_B is None else bool(is_true_B[place]),
        )
        for place in np.argsort(-mass_B, kind="stable")[:NUM_SHOWN]
    ]
    return PairJudgement(
        clip=said.keys[clip],
        caption=said.captions[caption],
        mass_annotated=float(mass_B[0]),
        mass_true=None if is_true_B is None else float(mass_B[is_true_B].sum()),
        most_mass=most_mass,
    )


def _captions_of_others(said: Said, clip: int, num_clips: int, seed: int) -> NDArray[np.int64]:
    """One caption each of some other clips."""
    generator = np.random.default_rng(seed)
    captioned = np.unique(said.clip_C)
    return drawn_captions(said, generator.permutation(captioned[captioned != clip])[:num_clips], generator)
