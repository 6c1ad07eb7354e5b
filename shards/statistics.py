"""Statistics of a set: ``python -m shards.statistics shards=FOLDER key=value ...``

1. Shards are read in parallel, each clip as training decodes it.
2. Each clip gives the float64 sum, sum of squares and number of its valid log-mel energies, its level and its size.
3. ``math.fsum`` adds them without rounding on the way, so the result does not depend on shards or workers.
4. Out come the two words that normalise a recipe's FBANK, a summary for people, and a picture on request.
"""

from __future__ import annotations

import contextlib
import io
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import torch
import yaml
from numpy.typing import NDArray

from audiotext_dist import storage
from audiotext_dist.configuration import describe, parse
from audiotext_dist.data.bad_samples import BadSampleError
from audiotext_dist.data.decode import DecodeConfig, decode_clip
from audiotext_dist.data.plan import Slot
from audiotext_dist.data.sample import AUDIO_MEMBER
from audiotext_dist.data.shard import Shard, load_shards
from audiotext_dist.data.shard_reader import ShardReader
from audiotext_dist.errors import UserError, run_for_people
from audiotext_dist.models.frontends import INT16_FULL_SCALE, Fbank, FbankConfig
from shards.passes import default_num_workers, map_shards

NUM_LABELS_SHOWN = 20
# The level of digital silence is minus infinity: half a step of 16 bits stands for it.
LOWEST_RMS = 0.5 / INT16_FULL_SCALE


@dataclass(frozen=True, kw_only=True)
class StatisticsConfig:
    """What is measured, and where it goes.

    shards: folder, glob or braces, local or a URL. sample_rate_hz: of the set. clip_seconds: of each clip,
    from its start, as training crops it. num_mel_bins, frame_length_ms, frame_shift_ms: the recipe's
    model.audio.fbank. out: a YAML file with the recipe's keys. picture: a PNG with histograms.
    """

    shards: str = "???"
    sample_rate_hz: int = 32000
    clip_seconds: float = 10.0
    num_mel_bins: int = FbankConfig.num_mel_bins
    frame_length_ms: float = FbankConfig.frame_length_ms
    frame_shift_ms: float = FbankConfig.frame_shift_ms
    out: str | None = None
    picture: str | None = None
    num_workers: int = field(default_factory=default_num_workers)

    def __post_init__(self) -> None:
        if self.sample_rate_hz < 1 or self.clip_seconds <= 0 or self.num_workers < 1:
            raise UserError("sample_rate_hz, clip_seconds and num_workers must be above 0")
        if self.num_fbank_frames < 1:
            raise UserError(f"clip_seconds={self.clip_seconds:g} is shorter than one FBANK frame: give more")

    @property
    def num_fbank_frames(self) -> int:
        """FBANK frames of ``clip_seconds``."""
        return round(self.clip_seconds * 1000 / self.frame_shift_ms)

    def fbank_config(self) -> FbankConfig:
        """The frontend, without masks."""
        return FbankConfig(
            num_mel_bins=self.num_mel_bins,
            frame_length_ms=self.frame_length_ms,
            frame_shift_ms=self.frame_shift_ms,
            num_fbank_frames=self.num_fbank_frames,
            freq_mask_bins=0,
            time_mask_frames=0,
        )


@dataclass(kw_only=True)
class Facts:
    """What one shard, or a whole set, says of its clips.

    clips: float64 [num_clips, 6], one row a clip: sum and sum of squares of its log-mel energies, how many
    they are, seconds, RMS level with full scale at 1, captions.
    """

    clips: NDArray[np.float64]
    caption_characters: Counter[int] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    sample_rates_hz: Counter[int] = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)
    num_shards: int = 1
    num_bytes: int = 0

    @property
    def mean_and_std(self) -> tuple[float, float]:
        """Of all valid log-mel energies.

        Raises:
            UserError: no clip has a valid FBANK frame.
        """
        total, squares, count = (math.fsum(self.clips[:, column]) for column in range(3))
        if count == 0:
            raise UserError("no clip is as long as one FBANK frame: check clip_seconds and sample_rate_hz")
        mean = total / count
        return mean, math.sqrt(max(0.0, squares / count - mean**2))


def main() -> None:
    """The command."""
    words = sys.argv[1:]
    if not words or {"-h", "--help"} & set(words):
        usage = "usage: python -m shards.statistics shards=FOLDER key=value ..."
        print(f"{usage}\n\n{StatisticsConfig.__doc__}\nKeys and defaults:\n\n{describe(StatisticsConfig)}")
        return
    config = parse(StatisticsConfig, words)
    facts = measure(config)
    mean, std = facts.mean_and_std
    print(summary(facts))
    print(f"model.audio.fbank.mean={mean:.4f} model.audio.fbank.std={std:.4f}")
    if config.out is not None:
        storage.write_bytes(config.out, recipe_yaml(config, mean, std))
    if config.picture is not None:
        from shards.histograms import draw

        draw(config.picture, facts.clips[:, 3], levels_dbfs(facts))


def measure(config: StatisticsConfig) -> Facts:
    """One pass over the set.

    Raises:
        UserError: no shards, no clip that can be read, or a worker was killed.
    """
    found = list(map_shards(partial(_measure_shard, config=config), load_shards(config.shards), config.num_workers))
    facts = Facts(
        clips=np.concatenate([shard.clips for shard in found]),
        caption_characters=sum((shard.caption_characters for shard in found), Counter[int]()),
        labels=sum((shard.labels for shard in found), Counter[str]()),
        sample_rates_hz=sum((shard.sample_rates_hz for shard in found), Counter[int]()),
        unreadable=[reason for shard in found for reason in shard.unreadable],
        num_shards=len(found),
        num_bytes=sum(shard.num_bytes for shard in found),
    )
    if not len(facts.clips):
        why = facts.unreadable[0] if facts.unreadable else "the set is empty"
        raise UserError(f"no clip could be read at {config.sample_rate_hz} Hz ({why}): give the set's sample_rate_hz=")
    return facts


def levels_dbfs(facts: Facts) -> NDArray[np.float64]:
    """Each clip's RMS level in dB below full scale, float64 [num_clips]."""
    levels: NDArray[np.float64] = 20 * np.log10(np.maximum(facts.clips[:, 4], LOWEST_RMS))
    return levels


def recipe_yaml(config: StatisticsConfig, mean: float, std: float) -> bytes:
    """The recipe's keys that these statistics belong to."""
    fbank = {
        "num_mel_bins": config.num_mel_bins,
        "frame_length_ms": config.frame_length_ms,
        "frame_shift_ms": config.frame_shift_ms,
        "num_fbank_frames": config.num_fbank_frames,
        "mean": mean,
        "std": std,
    }
    return str(yaml.safe_dump({"model": {"audio": {"fbank": fbank}}}, sort_keys=False)).encode()


def summary(facts: Facts) -> str:
    """The set in some lines for a person."""
    seconds, captions, levels = facts.clips[:, 3], facts.clips[:, 5], levels_dbfs(facts)
    lengths = np.repeat(*np.array(sorted(facts.caption_characters.items()) or [(0, 0)]).T)
    lines = [
        f"{len(facts.clips)} clips in {facts.num_shards} shards: {math.fsum(seconds) / 3600:.2f} hours, "
        f"{facts.num_bytes / 1e9:.3f} GB",
        f"seconds a clip: {_spread(seconds)}",
        f"level, dBFS RMS: {_spread(levels)}",
        f"captions a clip: {_spread(captions)}",
        f"characters a caption: {_spread(lengths)}" if len(lengths) else "no captions",
        "sample rates: " + ", ".join(f"{rate} Hz {count}" for rate, count in sorted(facts.sample_rates_hz.items())),
    ]
    if facts.labels:
        top = facts.labels.most_common(NUM_LABELS_SHOWN)
        lines.append(f"{len(facts.labels)} labels: " + ", ".join(f"{name} {count}" for name, count in top))
    if facts.unreadable:
        lines.append(
            f"{len(facts.unreadable)} clips could not be read, the first: {facts.unreadable[0]}; "
            "python -m shards.verify names them all"
        )
    return "\n".join(lines)


def _spread(values: NDArray[np.float64]) -> str:
    return f"{values.min():.2f} to {values.max():.2f}, mean {values.mean():.2f}"


def _measure_shard(shard: Shard, config: StatisticsConfig) -> Facts:
    # The processes share the cores already.
    torch.set_num_threads(1)
    fbank = Fbank(config.fbank_config(), config.sample_rate_hz)
    decode = DecodeConfig(
        sample_rate_hz=config.sample_rate_hz,
        clip_seconds=config.clip_seconds,
        audio=True,
        frames="none",
        num_frames=1,
        frame_pixels=1,
        random=False,
    )
    facts = Facts(clips=np.zeros((0, 6)), num_bytes=shard.num_bytes)
    rows = []
    with contextlib.closing(ShardReader([shard])) as reader:
        for row, key in enumerate(shard.index.keys):
            try:
                rows.append(_measure_clip(facts, reader, row, key, decode, fbank))
            except BadSampleError as error:
                facts.unreadable.append(f"{Path(shard.path).name} {key}: {error}")
    facts.clips = np.array(rows, np.float64).reshape(-1, 6)
    return facts


def _measure_clip(
    facts: Facts, reader: ShardReader, row: int, key: str, decode: DecodeConfig, fbank: Fbank
) -> Sequence[float]:
    """The clip's row of ``Facts.clips``; its words are counted in ``facts``."""
    clip = decode_clip(reader, key, Slot(shard=0, row=row), decode, seed=0, epoch=0)
    with soundfile.SoundFile(io.BytesIO(reader.read(0, row, AUDIO_MEMBER))) as file:
        seconds = file.frames / file.samplerate
        facts.sample_rates_hz[int(file.samplerate)] += 1
    facts.caption_characters.update(map(len, clip.metadata.text))
    facts.labels.update(clip.metadata.labels)
    # One clip at a time: float32 sums inside a batch may depend on its other clips.
    energies_TF = fbank.log_mel_energies(torch.from_numpy(clip.waveform)[None])[0]
    valid_T = fbank.is_valid_frame(torch.tensor([clip.num_valid_samples]))[0]
    energies = energies_TF[valid_T].double()
    sound = clip.waveform[: clip.num_valid_samples].astype(np.float64) / INT16_FULL_SCALE
    rms = math.sqrt(float(np.mean(sound**2)))
    return (
        float(energies.sum()),
        float(energies.square().sum()),
        energies.numel(),
        seconds,
        rms,
        len(clip.metadata.text),
    )


if __name__ == "__main__":
    run_for_people(main)
