"""Which sets of shards a run reads: their configuration, their opening, and the plan over them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from audiotext_dist import storage
from audiotext_dist.data.bad_samples import BadSampleError
from audiotext_dist.data.cache import NodeCache, default_folder
from audiotext_dist.data.decode import DecodeConfig, FrameChoice, decode_metadata
from audiotext_dist.data.plan import Plan, check_lanes, default_num_lanes
from audiotext_dist.data.sample import AUDIO_MEMBER, METADATA_MEMBER, ClipMetadata, frame_member
from audiotext_dist.data.shard import Shard, load_shards
from audiotext_dist.data.shard_reader import ShardReader, Verify
from audiotext_dist.distributed import World
from audiotext_dist.errors import UserError, require_positive
from audiotext_dist.retry import RetryConfig

Benchmark = Literal["audiocaps-val", "audiocaps-test", "clotho-validation", "clotho-evaluation"]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SetConfig:
    """One set of shards.

    shards: folder, glob or ``{00000..00099}.tar`` braces, local or a URL. weight (training only): how often an epoch
    holds each clip. relevance (evaluation only): ``labels``, every clip that shares a label is found; or a file that
    says which captions truly describe which clips. benchmark (evaluation only): which published test set this is, so
    that the table tells how many of its clips are here. features: folder or URL of its feature files, null for beside
    the shards.
    """

    shards: str = "???"
    weight: float = 1.0
    relevance: str | None = None
    benchmark: Benchmark | None = None
    features: str | None = None


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which clips are read, and how.

    frame_features, caption_features: NAME of what launch/embed.py features=NAME wrote; the frozen image or text tower
    then says nothing itself, and no JPEG is opened. teachers: by NAME of such features of both towers, the run folder,
    checkpoint or export that made them, against which they are checked; null takes whichever made them all. For
    loss.teacher_weight. cache_dir, cache_bytes: where a node holds remote shards, and how
    much of them. fetch_retries, fetch_stall_seconds: attempts after the first at what a server refuses, and how long
    one may send nothing.
    """

    train: dict[str, SetConfig] = field(default_factory=dict)
    validation: dict[str, SetConfig] = field(default_factory=dict)
    sample_rate_hz: int = 32000
    clip_seconds: float = 10.0
    num_frames: int = 4
    frame_features: str | None = None
    caption_features: str | None = None
    teachers: dict[str, str | None] = field(default_factory=dict)
    num_lanes: int | None = None  # default: the most up to 64 that the batch divides into
    window_shards: int = 4
    num_workers: int = 2  # DataLoader workers a rank
    max_bad_share: float = 0.01  # of the samples read so far; above it, and ten of them, the run stops
    max_audio_seconds: float = 3600.0  # a longer sound is a bad sample
    verify: Verify = "size"  # of a shard when it is opened; sha256 reads it whole once a worker
    cache_dir: str = field(default_factory=default_folder)
    cache_bytes: int = NodeCache.max_bytes
    fetch_retries: int = RetryConfig.retries
    fetch_stall_seconds: float = RetryConfig.stall_seconds

    def __post_init__(self) -> None:
        for name, chosen in self.train.items():
            if not 0 < chosen.weight < math.inf:
                raise UserError(f"data set '{name}' has weight {chosen.weight}: give one above 0, or leave the set out")
            for key in ("relevance", "benchmark"):
                if getattr(chosen, key) is not None:
                    raise UserError(f"data.train.{name}.{key} says nothing to training: give it in data.validation")
        for name, chosen in self.validation.items():
            if chosen.weight != SetConfig.weight:
                raise UserError(
                    f"data.validation.{name}.weight={chosen.weight:g} says nothing to evaluation, which takes each "
                    "clip once: leave it out"
                )
        require_positive(self, "data", "sample_rate_hz", "clip_seconds", "num_frames", "num_lanes", "window_shards")
        if not self.clip_seconds <= self.max_audio_seconds < math.inf:
            raise UserError(
                f"data.max_audio_seconds={self.max_audio_seconds:g} must be finite and at least data.clip_seconds="
                f"{self.clip_seconds:g}"
            )
        require_positive(self, "data", "cache_bytes", "fetch_stall_seconds")
        if storage.is_remote(self.cache_dir):
            raise UserError(f"data.cache_dir={storage.public_name(self.cache_dir)} is remote: give a local folder")
        if self.fetch_retries < 0:
            raise UserError(f"data.fetch_retries={self.fetch_retries} must be 0 or more")
        if not 0 <= self.max_bad_share <= 1:
            raise UserError(f"data.max_bad_share={self.max_bad_share} must lie in [0, 1]")
        if self.num_workers < 0:
            raise UserError(f"data.num_workers={self.num_workers} must be 0 or more")

    def lanes(self, global_batch_size: int) -> int:
        """num_lanes, or its default."""
        return self.num_lanes or default_num_lanes(global_batch_size)

    def node_cache(self) -> NodeCache:
        """The cache's part of this configuration."""
        retry = RetryConfig(retries=self.fetch_retries, stall_seconds=self.fetch_stall_seconds)
        return NodeCache(folder=self.cache_dir, max_bytes=self.cache_bytes, retry=retry)

    def decode_config(
        self, *, audio: bool = True, frames: FrameChoice, frame_pixels: int, random: bool
    ) -> DecodeConfig:
        """The decoder's part of this configuration."""
        return DecodeConfig(
            sample_rate_hz=self.sample_rate_hz,
            clip_seconds=self.clip_seconds,
            audio=audio,
            frames=frames,
            num_frames=self.num_frames,
            frame_pixels=frame_pixels,
            random=random,
            max_audio_seconds=self.max_audio_seconds,
            verify=self.verify,
            pictures=self.frame_features is None,
        )


def open_sets(sets: dict[str, SetConfig], config: DataConfig, *, frames: bool, captions: bool) -> list[list[Shard]]:
    """The shards of every set, checked against what the recipe needs of them.

    Raises:
        UserError: a set is missing, empty, at another sample rate, or lacks frames or captions.
    """
    opened = []
    for name, chosen in sets.items():
        try:
            shards = load_shards(chosen.shards, config.node_cache())
        except UserError as error:
            raise UserError(f"data set '{name}': {error}") from None
        shards = [shard for shard in shards if shard.num_samples]
        if not shards:
            raise UserError(f"data set '{name}' at {storage.public_name(chosen.shards)} holds no clips: build it again")
        _check_contents(name, shards, config, frames=frames, captions=captions)
        opened.append(shards)
    return opened


def _check_contents(name: str, shards: Sequence[Shard], config: DataConfig, *, frames: bool, captions: bool) -> None:
    """What lists and indexes tell of every shard; where they leave something open, what the first clip says."""
    needed = {AUDIO_MEMBER, METADATA_MEMBER, *(frame_member(i) for i in range(config.num_frames) if frames)}
    missing_of = {members: sorted(needed - set(members.split())) for members in {shard.members for shard in shards}}
    for shard in shards:
        if missing := missing_of[shard.members]:
            raise UserError(
                f"data set '{name}' has no {', '.join(missing)} in {storage.public_name(shard.path)}: "
                "build it with as many frames as data.num_frames, or choose another task"
            )
    rates_hz = {shard.sample_rate_hz for shard in shards}
    has_captions = any(shard.num_captioned for shard in shards)
    if 0 in rates_hz or any(shard.num_captioned is None for shard in shards):
        metadata = _first_metadata(name, shards[0], config.node_cache())
        rates_hz.add(metadata.sample_rate)
        has_captions = has_captions or bool(metadata.text)
    if others := rates_hz - {0, config.sample_rate_hz}:
        raise UserError(
            f"data set '{name}' was built at {min(others)} Hz: set data.sample_rate_hz to that, "
            f"or build it with sample_rate_hz={config.sample_rate_hz}"
        )
    if captions and not has_captions:
        raise UserError(f"data set '{name}' has no captions, and this task needs them: choose another set or task")


def _first_metadata(name: str, shard: Shard, cache: NodeCache) -> ClipMetadata:
    """The JSON of the shard's first clip that can be read: a broken one says nothing of the set."""
    with contextlib.closing(ShardReader([shard], cache)) as reader:
        for row, key in enumerate(shard.index.keys):
            with contextlib.suppress(BadSampleError):
                return decode_metadata(reader.read(0, row, METADATA_MEMBER), key)
    raise UserError(
        f"data set '{name}': no json of {storage.public_name(shard.path)} can be read: build or copy it again"
    )


def warn_of_small_cache(
    sets: Sequence[Sequence[Shard]], config: DataConfig, *, global_batch_size: int, world: World
) -> None:
    """Say so where the shards that this node reads at once are more than its cache holds."""
    remote = [shard.num_bytes for shards in sets for shard in shards if storage.is_remote(shard.path)]
    if not remote:
        return
    lanes = config.lanes(global_batch_size) * world.local_size / world.size
    at_once_bytes = int(min(lanes * config.window_shards, len(remote)) * sum(remote) / len(remote))
    if at_once_bytes > config.cache_bytes:
        _log.warning(
            "data.cache_bytes=%d is less than the %d bytes of remote shards that this node reads at once "
            "(%d lanes of %d shards), so shards are fetched again and again: raise it to twice that, or lower "
            "data.window_shards or data.num_lanes",
            config.cache_bytes,
            at_once_bytes,
            lanes,
            config.window_shards,
        )


def make_plan(
    sets: Sequence[Sequence[Shard]],
    config: DataConfig,
    *,
    seed: int,
    epoch: int,
    global_batch_size: int,
    world_size: int,
) -> Plan:
    """The plan of one epoch over the training sets.

    Raises:
        UserError: the batch, the lanes and the ranks do not fit together, or the sets are too small.
    """
    num_lanes = config.lanes(global_batch_size)
    check_lanes(global_batch_size=global_batch_size, num_lanes=num_lanes, world_size=world_size)
    return Plan(
        set_sizes=[[shard.num_samples for shard in shards] for shards in sets],
        set_weights=[chosen.weight for chosen in config.train.values()],
        seed=seed,
        epoch=epoch,
        global_batch_size=global_batch_size,
        num_lanes=num_lanes,
        window_shards=config.window_shards,
    )


@dataclass(frozen=True, kw_only=True)
class DataOrder:
    """What fixes, with seed and batch size, which clip stands where in an epoch.

    shards: digest of their contents, in their order; the folder that they lie in may change.
    """

    num_lanes: int
    window_shards: int
    set_weights: tuple[float, ...]
    shards: str

    def settings(self) -> dict[str, object]:
        """Each by the name that a user knows."""
        return {
            "data.num_lanes": self.num_lanes,
            "data.window_shards": self.window_shards,
            "weights of data.train": self.set_weights,
            "shards of data.train (digest of their contents)": self.shards,
        }


def order_of(sets: Sequence[Sequence[Shard]], config: DataConfig, global_batch_size: int) -> DataOrder:
    """The order that ``make_plan`` gives these training sets."""
    contents = json.dumps([[shard.sha256 for shard in shards] for shards in sets])
    return DataOrder(
        num_lanes=config.lanes(global_batch_size),
        window_shards=config.window_shards,
        set_weights=tuple(chosen.weight for chosen in config.train.values()),
        shards=hashlib.sha256(contents.encode()).hexdigest()[:16],
    )
