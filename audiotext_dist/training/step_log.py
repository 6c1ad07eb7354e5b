"""What a run says of a step: its metrics, and the text beside the progress bar."""

from __future__ import annotations

import math
from collections.abc import Mapping

from audiotext_dist.training.step import StepResult


def step_metrics(result: StepResult) -> dict[str, float]:
    """Name -> figure of one step; those that are not finite are left out, since JSON knows no such numbers."""
    measured = {
        "train/loss": result.loss,
        **{f"train/{name}": value for name, value in result.figures.items()},
        "train/logit_scale": result.logit_scale,
        "optim/gradient_norm": result.gradient_norm,
        "optim/loss_scale": result.loss_scale,
    }
    return {name: value for name, value in measured.items() if value is not None and math.isfinite(value)}


def progress_line(
    epoch: float, loss: float, learning_rate: float, read: Mapping[str, float], bad_samples: Mapping[str, int]
) -> str:
    """One line for people; ``read``: from ``Meter.read``, ``bad_samples``: from ``BadSampleCount.check``."""
    cached = [read[f"data/{name}"] for name in ("cache_hits", "cache_misses", "prefetch_waits")]
    shown = (
        f"epoch {epoch:.1f}, loss {loss:.3f}, lr {learning_rate:.1e}, "
        f"{read['data/clips_per_second']:.0f} clips/s, {read['data/read_bytes_per_second'] / 1e6:.1f} MB/s, "
        f"waiting {100 * read['data/waiting_share_max']:.0f}%"
    )
    if sum(cached):
        hits, _, waits = cached
        shown += (
            f", fetched {read['data/fetched_bytes_per_second'] / 1e6:.1f} MB/s, hits {hits:.0f} of {hits + waits:.0f}"
        )
    kinds = [f"{count} {name.partition('/')[2]}" for name, count in bad_samples.items() if "/" in name]
    if kinds:
        shown += f", replaced {', '.join(kinds)}"
    return shown
