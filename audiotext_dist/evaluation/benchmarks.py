"""How many clips and captions the published test sets have, to tell which part of one an evaluation has seen."""

from __future__ import annotations

from dataclasses import dataclass

from audiotext_dist.data.sets import Benchmark
from audiotext_dist.errors import UserError

# Clips of the lists as published; five captions a clip in all of them. YouTube clips vanish: papers report AudioCaps
# test with 975, 957 and 845 clips, whose figures do not compare.
_NUM_CLIPS: dict[Benchmark, int] = {
    "audiocaps-val": 495,
    "audiocaps-test": 975,
    "clotho-validation": 1045,
    "clotho-evaluation": 1045,
}
_CAPTIONS_A_CLIP = 5


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """The clips and captions that were evaluated, and those of the benchmark's official list."""

    benchmark: Benchmark
    num_clips: int
    num_captions: int
    num_official_clips: int
    num_official_captions: int

    def __str__(self) -> str:
        return (
            f"{self.num_clips:,} of the {self.num_official_clips:,} clips and {self.num_captions:,} of the "
            f"{self.num_official_captions:,} captions of {self.benchmark}"
        )


def coverage(benchmark: Benchmark | None, num_clips: int, num_captions: int, set_name: str) -> Coverage | None:
    """How much of its benchmark a set holds; None where it is of none.

    Raises:
        UserError: it holds more than that.
    """
    if benchmark is None:
        return None
    found = Coverage(
        benchmark=benchmark,
        num_clips=num_clips,
        num_captions=num_captions,
        num_official_clips=_NUM_CLIPS[benchmark],
        num_official_captions=_CAPTIONS_A_CLIP * _NUM_CLIPS[benchmark],
    )
    check_benchmark(benchmark, num_clips, set_name)
    if num_captions > found.num_official_captions:
        raise UserError(f"data set '{set_name}' holds {found}: it is not that, set its benchmark to null")
    return found


def check_benchmark(benchmark: Benchmark | None, num_clips: int, set_name: str) -> None:
    """Raise ``UserError`` where a set has more clips than the benchmark that it is said to be."""
    if benchmark is not None and num_clips > _NUM_CLIPS[benchmark]:
        raise UserError(
            f"data set '{set_name}' holds {num_clips:,} clips and {benchmark} {_NUM_CLIPS[benchmark]:,}: it is not "
            "that, set its benchmark to null"
        )
