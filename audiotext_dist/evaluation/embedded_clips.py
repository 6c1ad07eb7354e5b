"""Every clip of an evaluation set, embedded on both of the task's sides: shared out over ranks, whole on each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from audiotext_dist.data.batch import Batch
from audiotext_dist.data.features import Features
from audiotext_dist.data.loader import EvaluationBatches
from audiotext_dist.data.sets import DataConfig
from audiotext_dist.data.shard import Shard
from audiotext_dist.data.workers import iterate
from audiotext_dist.distributed import World, any_over_ranks, gather_items, raise_together
from audiotext_dist.errors import UserError
from audiotext_dist.models.dual_encoder import DualEncoder, Task, unit_length

# Which frame a clip is found by; under Multiframe Match it is always all of them.
EvaluatedFrame = Literal["middle", "best"]


class EvaluationStoppedError(Exception):
    """Some rank was asked to stop; raised on all of them, with nothing of the evaluation done."""


class EmbeddedClip(NamedTuple):
    """One clip's embeddings: a row for its audio or frame, as many as it has captions for its text.

    A row is [D], or [L, D] where the best frame counts.
    """

    key: str
    labels: list[str]
    first_RD: NDArray[np.float32]
    second_RD: NDArray[np.float32]


@torch.no_grad()
def embed_set(
    model: DualEncoder,
    task: Task,
    shards: Sequence[Shard],
    data: DataConfig,
    *,
    batch_size: int,
    world: World,
    features: Features,
    frame: EvaluatedFrame,
    is_asked_to_stop: Callable[[], bool] | None = None,
) -> list[EmbeddedClip]:
    """The clips in the order of their keys; every rank calls it.

    is_asked_to_stop: looked at on every rank after each batch.

    Raises:
        UserError: a clip that cannot be decoded or embedded, or has no caption.
        EvaluationStoppedError: some rank is asked to stop.
    """
    was_training = model.training
    model.eval()
    all_frames = "image" in task and (frame == "best" or model.matches_all_frames)
    decode = data.decode_config(
        audio="audio" in task,
        frames=("all" if all_frames else "middle") if "image" in task else "none",
        frame_pixels=model.frame_pixels,
        random=False,
    )
    batches = EvaluationBatches(
        shards, decode, world=world, batch_size=batch_size, features=features, cache=data.node_cache()
    )
    own: list[EmbeddedClip] = []
    own_batches = iterate(batches, range(len(batches)), num_workers=data.num_workers, device=world.device)
    # As many rounds on every rank, though one may have a batch less: after each they agree whether to go on.
    for _ in range(math.ceil(sum(shard.num_samples for shard in shards) / (world.size * batch_size))):
        error: UserError | None = None
        try:
            for batch in itertools.islice(own_batches, 1):
                own += _embed(model, task, batch, all_frames=all_frames)
        except UserError as met:
            error = met
        raise_together(error)
        if is_asked_to_stop is not None and any_over_ranks(is_asked_to_stop()):
            raise EvaluationStoppedError
    model.train(was_training)
    # Sorted by key, the rows stand in the same order for every world size.
    return sorted((clip for share in gather_items(own) for clip in share), key=lambda clip: clip.key)


def _embed(model: DualEncoder, task: Task, batch: Batch, *, all_frames: bool) -> list[EmbeddedClip]:
    sides: list[list[NDArray[np.float32]]] = []
    for modality in task.split("-"):
        match modality:
            case "audio":
                rows_RD = model.embed_audio(batch.waveform_BS, batch.num_valid_samples_B)
                sides.append(list(rows_RD.cpu().numpy()[:, None]))
            case "image":
                sides.append(list(_embed_frames(model, batch, all_frames=all_frames).cpu().numpy()[:, None]))
            case "text":
                sides.append(_embed_captions(model, batch))
    return [
        EmbeddedClip(key=key, labels=metadata.labels, first_RD=first_RD, second_RD=second_RD)
        for key, metadata, first_RD, second_RD in zip(batch.keys, batch.metadata, *sides, strict=True)
    ]


def _embed_frames(model: DualEncoder, batch: Batch, *, all_frames: bool) -> torch.Tensor:
    known = batch.frame_embeddings_BLD if all_frames else batch.frame_embeddings_BD
    if known is not None:
        return model.joined(unit_length(known))
    frames = batch.frames_BLHWC if all_frames else batch.frames_BHWC
    assert frames is not None
    return model.joined(model.embed_images(frames))


def _embed_captions(model: DualEncoder, batch: Batch) -> list[NDArray[np.float32]]:
    for key, metadata in zip(batch.keys, batch.metadata, strict=True):
        if not metadata.text:
            raise UserError(f"clip {key} has no caption to be found by: rebuild the set without it")
    if batch.caption_embeddings_ND is not None:
        rows_RD = unit_length(batch.caption_embeddings_ND)
    else:
        assert model.text is not None
        captions = [caption for metadata in batch.metadata for caption in metadata.text]
        rows_RD = model.embed_text(model.text.tokenize(captions).to(batch.waveform_BS.device))
    return np.split(rows_RD.cpu().numpy(), np.cumsum([len(metadata.text) for metadata in batch.metadata])[:-1])
