"""What teachers think of every pair of a clip and a caption, held against what is known to be true.

1. ``read_said`` reads what each teacher says of a set's clips and captions, from the feature files of stage 2.
2. ``judge`` asks how well its cosines tell true pairs from others, and where the mass of its targets goes.

Shapes: K clips, C captions of all of them, E embedding of a teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from audiotext_dist.data.bad_samples import BadSampleError
from audiotext_dist.data.decode import decode_metadata
from audiotext_dist.data.feature_files import open_features
from audiotext_dist.data.features import FeatureReader
from audiotext_dist.data.sample import METADATA_MEMBER
from audiotext_dist.data.shard import Shard
from audiotext_dist.data.shard_reader import ShardReader
from audiotext_dist.errors import UserError
from audiotext_dist.losses.targets import join_teachers


@dataclass(frozen=True, kw_only=True)
class Said:
    """Of K clips and their C captions, by the name of the teacher: embeddings [K, E] and [C, E].

    labels: of each clip. clip_C: the clip that each caption was written for. number_C: which of its captions it is.
    """

    keys: list[str]
    labels: list[list[str]]
    captions: list[str]
    clip_C: NDArray[np.int64]
    number_C: NDArray[np.int64]
    audio: dict[str, NDArray[np.float32]]
    text: dict[str, NDArray[np.float32]]

    def cosines(self, teachers: Sequence[str]) -> NDArray[np.float32]:
        """The mean over teachers of the cosine of each pair, [K, C]."""
        audio_KE, text_CE = (
            join_teachers([torch.from_numpy(side[name]) for name in teachers]) for side in (self.audio, self.text)
        )
        cosines: NDArray[np.float32] = (audio_KE @ text_CE.T).numpy()
        return cosines


def read_said(shards: Sequence[Shard], features: Sequence[str], folder: str | None, max_clips: int) -> Said:
    """What the features of these names say of a set's first clips; one that a teacher could not embed is passed over.

    Raises:
        UserError: features are missing, stale or of other towers; or no clip is left.
    """
    readers = {}
    for name in features:
        files = open_features(shards, name, folder, {}, "shards")
        for modality in ("audio", "text"):
            if modality not in files[0].file.header.encoders:
                raise UserError(f"'{name}' features hold no {modality}: make them with launch/embed.py run=RUN")
        readers[name] = FeatureReader(files, "audio"), FeatureReader(files, "text")
    members = ShardReader(shards)
    keys: list[str] = []
    labels: list[list[str]] = []
    captions: list[list[str]] = []
    audio: dict[str, list[NDArray[np.float32]]] = {name: [] for name in readers}
    text: dict[str, list[NDArray[np.float32]]] = {name: [] for name in readers}
    for place, row in ((place, row) for place, shard in enumerate(shards) for row in range(shard.num_samples)):
        if len(keys) == max_clips:
            break
        key = shards[place].index.keys[row]
        try:
            metadata = decode_metadata(members.read(place, row, METADATA_MEMBER), key)
            said = {name: (sound.read(place, row), words.read(place, row)) for name, (sound, words) in readers.items()}
        except BadSampleError:
            continue
        keys.append(key)
        labels.append(metadata.labels)
        captions.append(metadata.text)
        for name, (audio_1E, text_NE) in said.items():
            audio[name].append(audio_1E)
            text[name].append(text_NE)
    if not any(captions):
        raise UserError("no clip of these shards has a caption that was embedded: give other shards=")
    return Said(
        keys=keys,
        labels=labels,
        captions=[caption for each in captions for caption in each],
        clip_C=np.repeat(np.arange(len(keys)), [len(each) for each in captions]),
        number_C=np.concatenate([np.arange(len(each)) for each in captions]),
        audio={name: np.concatenate(rows) for name, rows in audio.items()},
        text={name: np.concatenate(rows) for name, rows in text.items()},
    )


def annotated(said: Said) -> NDArray[np.bool_]:
    """True for each clip and the captions that were written for it, [K, C]."""
    written: NDArray[np.bool_] = said.clip_C == np.arange(len(said.keys))[:, None]
    return written


def truth(said: Said, relevance: Sequence[Mapping[str, Any]]) -> NDArray[np.bool_]:
    """True where a caption truly describes a clip, [K, C], as the lines of a relevance file say."""
    clip_of = {key: number for number, key in enumerate(said.keys)}
    caption_of = {
        (said.keys[clip], int(number)): place
        for place, (clip, number) in enumerate(zip(said.clip_C, said.number_C, strict=True))
    }
    true_KC = np.zeros((len(said.keys), len(said.captions)), np.bool_)
    for line in relevance:
        clips = [clip_of[key] for key in line["clips"] if key in clip_of]
        captions = [caption_of[pair] for pair in line["captions"] if pair in caption_of]
        true_KC[np.ix_(clips, captions)] = True
    return true_KC


def truth_of_labels(said: Said) -> NDArray[np.bool_]:
    """True where a caption was written for a clip that shares a label with this one, [K, C]."""
    names = sorted({label for labels in said.labels for label in labels})
    has_KL = np.array([[name in labels for name in names] for labels in said.labels], np.float32)
    shared: NDArray[np.bool_] = has_KL @ has_KL[said.clip_C].T > 0
    return shared


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """How good a teacher, or several, is.

    mass_annotated, mass_true: of the targets that a batch gets of it, the share on a clip's own caption, and on all
    captions that truly describe it, where that is known. average_precision: of its cosines over all pairs;
    average_precision_unannotated: the same without each clip's own captions, with which the teacher was trained,
    None where no other pair is true.
    """

    mass_annotated: float
    mass_true: float | None = None
    average_precision: float | None = None
    average_precision_unannotated: float | None = None


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Batches as training draws them, over whose captions the targets are softmaxed.

    size: clips, each with one of its captions. num_draws: times that all clips are put in a new order, each with a
    caption drawn anew.
    """

    size: int
    num_draws: int = 5
    seed: int = 0

    def draw(self, said: Said) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Clips and the caption of each, in whole batches (or one smaller one); a clip without captions has no part."""
        generator = np.random.default_rng(self.seed)
        captioned = np.unique(said.clip_C)
        size = min(self.size, len(captioned))
        for _ in range(self.num_draws):
            clips = captioned[generator.permutation(len(captioned))]
            captions = drawn_captions(said, clips, generator)
            for at in range(0, len(clips) - size + 1, size):
                yield clips[at : at + size], captions[at : at + size]


def drawn_captions(said: Said, clips: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.int64]:
    """One of the captions of each clip."""
    first_caption, after = (np.searchsorted(said.clip_C, clips, side=side) for side in ("left", "right"))
    found: NDArray[np.int64] = first_caption + generator.integers(after - first_caption)
    return found


def judge(
    said: Said, teachers: Sequence[str], true_KC: NDArray[np.bool_] | None, temperature: float, batches: Batches
) -> Judgement:
    """Judge the mean of some teachers.

    Args:
        true_KC: what is true, None where nobody knows.

    Raises:
        UserError: no pair is true.
    """
    cosine_KC = said.cosines(teachers)
    mass_annotated, mass_true = _masses(said, cosine_KC, true_KC, temperature, batches)
    if true_KC is None:
        return Judgement(mass_annotated=mass_annotated)
    others_KC = ~annotated(said)
    has_others = true_KC[others_KC].any()
    return Judgement(
        mass_annotated=mass_annotated,
        mass_true=mass_true,
        average_precision=average_precision(cosine_KC.ravel(), true_KC.ravel()),
        average_precision_unannotated=(
            average_precision(cosine_KC[others_KC], true_KC[others_KC]) if has_others else None
        ),
    )


def chance(said: Said, true_KC: NDArray[np.bool_], batches: Batches) -> Judgement:
    """What a teacher is worth that finds every pair equally near."""
    mass_annotated, mass_true = _masses(said, np.zeros(true_KC.shape, np.float32), true_KC, 1.0, batches)
    return Judgement(
        mass_annotated=mass_annotated,
        mass_true=mass_true,
        average_precision=float(true_KC.mean()),
        average_precision_unannotated=float(true_KC[~annotated(said)].mean()) if true_KC.shape[0] > 1 else None,
    )


def _masses(
    said: Said, cosine_KC: NDArray[np.float32], true_KC: NDArray[np.bool_] | None, temperature: float, batches: Batches
) -> tuple[float, float | None]:
    """The mean share of a clip's target that lies on its own caption, and on all true ones."""
    on_own, on_true = [], []
    for clips, captions in batches.draw(said):
        pairs = np.ix_(clips, captions)
        target = softmax(cosine_KC[pairs] / temperature)
        on_own.append(np.diagonal(target).mean())
        if true_KC is not None:
            on_true.append((target * true_KC[pairs]).sum(axis=1).mean())
    return float(np.mean(on_own)), None if true_KC is None else float(np.mean(on_true))


def softmax(scores_KC: NDArray[np.float32]) -> NDArray[np.float32]:
    """Over each row."""
    shifted = np.exp(scores_KC - scores_KC.max(axis=1, keepdims=True))
    found: NDArray[np.float32] = shifted / shifted.sum(axis=1, keepdims=True)
    return found


def average_precision(scores: NDArray[np.float32], is_true: NDArray[np.bool_]) -> float:
    """The mean, over the true ones, of the precision down to its rank; among equal scores the others come first.

    Raises:
        UserError: nothing is true.
    """
    order = np.lexsort((is_true, -scores))
    ranks = np.flatnonzero(is_true[order]) + 1
    if not len(ranks):
        raise UserError("no pair of these clips and captions is true: give the relevance file of these very shards")
    return float(np.mean(np.arange(1, len(ranks) + 1) / ranks))
