"""What teachers think of every pair of a clip and a caption, held against what is known to be true.

1. ``read_said`` reads what each teacher says of a set's clips and captions, from the feature files of stage 2.
2. ``judge`` asks how well its cosines tell true pairs from others, and where the mass of its targets goes.

Shapes: K clips, C captions of all of them, E embedding of a teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

    average_precision: of its cosines over all pairs, where what is true is known. mass_annotated, mass_true: of the
    targets that a batch gets of it, the share on a clip's own caption, and on all captions that truly describe it.
    """

    mass_annotated: float
    average_precision: float | None = None
    mass_true: float | None = None


def judge(
    said: Said, teachers: Sequence[str], true_KC: NDArray[np.bool_] | None, *, temperature: float, batch_size: int
) -> Judgement:
    """Judge the mean of some teachers.

    Args:
        true_KC: what is true, None where nobody knows.
        batch_size: clips, each with one caption of its own, over whose captions the targets are softmaxed.
    """
    cosine_KC = said.cosines(teachers)
    written_KC = annotated(said)
    pairs = [(written_KC[clips][:, captions], clips, captions) for clips, captions in _batches(said, batch_size)]
    targets = [softmax(cosine_KC[np.ix_(clips, captions)] / temperature) for _, clips, captions in pairs]
    own = [(target * written).sum(axis=1) for target, (written, _, _) in zip(targets, pairs, strict=True)]
    mass_annotated = float(np.concatenate(own).mean())
    if true_KC is None:
        return Judgement(mass_annotated=mass_annotated)
    on_true = [
        (target * true_KC[np.ix_(clips, captions)]).sum(axis=1)
        for target, (_, clips, captions) in zip(targets, pairs, strict=True)
    ]
    return Judgement(
        mass_annotated=mass_annotated,
        average_precision=average_precision(cosine_KC.ravel(), true_KC.ravel()),
        mass_true=float(np.concatenate(on_true).mean()),
    )


def _batches(said: Said, batch_size: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """The clips that have a caption, in order, each with one of its own, in whole batches (or one smaller one)."""
    captioned, first_caption = np.unique(said.clip_C, return_index=True)
    num_whole = max(1, len(captioned) // batch_size)
    starts = range(0, num_whole * batch_size, batch_size)
    return [(captioned[at : at + batch_size], first_caption[at : at + batch_size]) for at in starts]


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
