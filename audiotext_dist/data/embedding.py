"""Frozen encoders over shards: the job that writes feature files.

1. The shards are dealt to the ranks, which know nothing of each other: each embeds its own, in batches that never
   cross a shard's end. So the files are the same on any number of ranks.
2. A shard's features that are there already are kept where this very encoder made them of this very shard, else
   refused before any work begins.
3. Each file is written whole under its name when its shard is through; a job that is killed goes on from there.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save
from tqdm import tqdm

from audiotext_dist import storage
from audiotext_dist.data.bad_samples import BadSample
from audiotext_dist.data.batch import Batch
from audiotext_dist.data.encoders import Encoder, Modality
from audiotext_dist.data.feature_files import (
    OFFSETS,
    FeatureFile,
    FeatureHeader,
    check_feature_name,
    content_sha256,
    feature_path,
    find_feature_files,
    is_damaged,
)
from audiotext_dist.data.row_batches import RowBatches
from audiotext_dist.data.sets import DataConfig
from audiotext_dist.data.shard import Shard
from audiotext_dist.data.workers import iterate
from audiotext_dist.distributed import World
from audiotext_dist.errors import UserError, require_positive
from audiotext_dist.models.dual_encoder import DualEncoder
from audiotext_dist.retry import RetryConfig

_log = logging.getLogger(__name__)
_DTYPES = {"fp32": np.float32, "fp16": np.float16}
Tensors = dict[str, NDArray[np.generic]]


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """What is embedded, and where it goes.

    features: the name of the files, SHARD.NAME.safetensors. what: audio, image, text; default: the frozen towers of a
    recipe, every tower of a run. shards: a set of its own, in place of the recipe's sets. out: the folder or URL of
    its files, default beside the shards. dtype: fp32 or fp16. batch_size: clips a rank embeds at once.
    max_bad_share: of the clips a rank has read; above it, and ten of them, the job stops. overwrite: make stale
    and damaged files anew; the others are read whole for it.
    """

    features: str = "???"
    what: list[Modality] = field(default_factory=list)
    shards: str | None = None
    out: str | None = None
    dtype: Literal["fp32", "fp16"] = "fp32"
    batch_size: int = 64
    max_bad_share: float = 0.01
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_feature_name(self.features, "features")
        require_positive(self, "embed", "batch_size")
        if not 0 <= self.max_bad_share <= 1:
            raise UserError(f"max_bad_share={self.max_bad_share} must lie in [0, 1]")
        if self.out is not None and self.shards is None:
            raise UserError("out= goes with shards=: for a recipe's sets give data.train.NAME.features=FOLDER")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A shard and the file that it is to have, or has.

    finished: the header of a file that is there and up to date.
    """

    shard: Shard
    path: str
    finished: FeatureHeader | None


def plan_jobs(
    sets: Iterable[tuple[Sequence[Shard], str | None]],
    config: EmbedConfig,
    encoders: dict[Modality, Encoder],
    retry: RetryConfig | None = None,
) -> list[Job]:
    """A job for each shard of some sets; a shard that stands in two of them counts once.

    Args:
        sets: the shards of each, and the folder of their features.

    Raises:
        UserError: two shards would share one file; or a file of this name is of another encoder or another shard,
            and is not to be overwritten.
    """
    shard_of: dict[str, Shard] = {}
    for shards, folder in sets:
        for shard in shards:
            path = feature_path(shard, config.features, folder)
            other = shard_of.setdefault(path, shard)
            if other.path != shard.path:
                raise UserError(
                    f"{storage.public_name(other.path)} and {storage.public_name(shard.path)} would share "
                    f"{storage.public_name(path)}: give the features of each folder of shards a folder of their own"
                )
    found = find_feature_files(list(shard_of), retry, refuse_damaged=not config.overwrite)
    return [
        Job(
            shard=shard,
            path=path,
            finished=file.header if file is not None and _is_up_to_date(file, shard, config, encoders) else None,
        )
        for (path, shard), file in zip(shard_of.items(), found, strict=True)
    ]


def jobs_to_do(jobs: Sequence[Job], config: EmbedConfig, retry: RetryConfig | None = None) -> list[Job]:
    """Those of a rank's jobs that are not finished; with ``overwrite`` also those whose file turns out damaged."""
    return [
        job
        for job in jobs
        if job.finished is None or (config.overwrite and is_damaged(job.path, job.finished.content_sha256, retry))
    ]


def _is_up_to_date(file: FeatureFile, shard: Shard, config: EmbedConfig, encoders: dict[Modality, Encoder]) -> bool:
    try:
        file.check_belongs(shard, encoders)
        if file.header.dtype != config.dtype or file.header.encoders.keys() != encoders.keys():
            raise UserError(
                f"{storage.public_name(file.path)} holds {file.header.dtype} of {', '.join(file.header.encoders)}: "
                "choose another features=NAME, or make it anew with overwrite=true"
            )
    except UserError:
        if not config.overwrite:
            raise
        return False
    return True


@torch.no_grad()
def embed_shards(
    model: DualEncoder,
    jobs: Sequence[Job],
    config: EmbedConfig,
    encoders: dict[Modality, Encoder],
    data: DataConfig,
    world: World,
) -> int:
    """Make the file of each job; the model is on its device. Returns how many rows could not be embedded.

    An error here may be this rank's alone.

    Raises:
        UserError: too many clips that do not decode, an embedding that is not finite, or a disk that refuses.
    """
    model.eval()
    decode = data.decode_config(
        audio="audio" in encoders,
        frames="all" if "image" in encoders else "none",
        frame_pixels=model.frame_pixels,
        random=False,
    )
    batches = RowBatches([job.shard for job in jobs], decode, config.batch_size, cache=data.node_cache(), world=world)
    num_read = num_bad = 0
    parts: list[Tensors] = []
    missing: dict[str, str] = {}
    with _progress_bar(sum(job.shard.num_samples for job in jobs), world) as bar:
        items = iterate(batches, range(len(batches)), num_workers=data.num_workers, device=world.device)
        for (number, rows), batch in zip(batches.rows, items, strict=True):
            job = jobs[number]
            bad = {rows.start + batch.keys.index(sample.key): sample.reason for sample in batch.bad_samples}
            parts.append(_embed(model, batch, rows, bad, list(encoders)))
            missing |= {str(row): reason for row, reason in bad.items()}
            num_read, num_bad = num_read + len(rows), num_bad + len(bad)
            _check_bad_share(num_bad, num_read, batch.bad_samples, config)
            bar.update(len(rows))
            if rows.stop == job.shard.num_samples:
                _write(job, config, encoders, parts, missing)
                parts, missing = [], {}
                if bar.disable:
                    _log.info("%s: %d clips", storage.public_name(job.path), rows.stop)
    return num_bad


def _embed(
    model: DualEncoder, batch: Batch, rows: range, bad: dict[int, str], modalities: Sequence[Modality]
) -> Tensors:
    """The part of a feature file that these rows make; zeros where a row is bad."""
    found: Tensors = {}
    num_captions = np.array([len(metadata.text) for metadata in batch.metadata])
    for modality in modalities:
        match modality:
            case "audio":
                audio_BD = model.embed_audio(batch.waveform_BS, batch.num_valid_samples_B)
                found[modality] = _to_numpy(audio_BD[:, None])
            case "image":
                image_ND = model.embed_images(batch.frames_BLHWC.flatten(0, 1))
                found[modality] = _to_numpy(image_ND.view(*batch.frames_BLHWC.shape[:2], -1))
            case "text":
                assert model.text is not None
                captions = [caption for metadata in batch.metadata for caption in metadata.text]
                tokens_CT = model.text.tokenize(captions) if captions else torch.zeros(0, 1, dtype=torch.int64)
                device = batch.waveform_BS.device
                text_CD = model.embed_text(tokens_CT.to(device)) if captions else torch.zeros(0, model.embed_dim)
                found |= {modality: _to_numpy(text_CD), OFFSETS: num_captions}
        row_of = np.repeat(np.array(rows), num_captions) if modality == "text" else np.array(rows)
        for row in bad:
            found[modality][row_of == row] = 0
        broken = row_of[~np.isfinite(found[modality].reshape(len(row_of), -1)).all(axis=1)]
        if len(broken):
            raise UserError(
                f"the {modality} embedding of clip {batch.keys[int(broken[0]) - rows.start]} is not finite: "
                "take the weights of another checkpoint"
            )
    return found


def _write(
    job: Job, config: EmbedConfig, encoders: dict[Modality, Encoder], parts: Sequence[Tensors], missing: dict[str, str]
) -> None:
    """Put a shard's file in its place."""
    tensors: Tensors = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    for modality in encoders:
        tensors[modality] = tensors[modality].astype(_DTYPES[config.dtype])
    if OFFSETS in tensors:
        tensors[OFFSETS] = np.concatenate([[0], np.cumsum(tensors[OFFSETS])]).astype(np.int64)
    index = job.shard.index
    header = FeatureHeader(
        shard=index.shard_name,
        shard_sha256=index.sha256,
        num_rows=index.num_samples,
        dtype=config.dtype,
        encoders=encoders,
        missing=missing,
        content_sha256=content_sha256(sorted(tensors.items())),
    )
    # Claimed, so that what a killed job left of this file is removed.
    with storage.claimed(job.path, wait=True):
        storage.write_bytes(job.path, save(tensors, header.to_metadata()))


def _to_numpy(tensor: torch.Tensor) -> NDArray[np.float32]:
    found: NDArray[np.float32] = tensor.float().cpu().numpy()
    return found


def _check_bad_share(num_bad: int, num_read: int, bad_samples: Sequence[BadSample], config: EmbedConfig) -> None:
    for bad in bad_samples:
        _log.warning("not embedded: %s of %s: %s", bad.key, bad.shard, bad.reason)
    # Ten, so that one bad clip among the first does not stop a job.
    if bad_samples and num_bad >= 10 and num_bad > math.floor(config.max_bad_share * num_read):
        last = bad_samples[-1]
        raise UserError(
            f"{num_bad} of {num_read} clips do not decode, more than max_bad_share={config.max_bad_share}, "
            f"the last {last.key} of {last.shard} ({last.reason}): rebuild those shards"
        )


def _progress_bar(num_clips: int, world: World) -> tqdm:
    """Rank 0's own share, with its clips a second."""
    return tqdm(
        total=num_clips,
        unit="clip",
        desc=f"rank 0 of {world.size}" if world.size > 1 else None,
        dynamic_ncols=True,
        disable=not (world.is_main and sys.stderr.isatty()),
    )
