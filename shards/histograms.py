"""A picture of a set: how long its clips are, and how loud."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray

from audiotext_dist import storage

NUM_BINS = 60


def draw(path: str, seconds: NDArray[np.float64], levels_dbfs: NDArray[np.float64]) -> None:
    """Write a PNG with the histograms of durations and of levels, float64 [num_clips] each."""
    # Not pyplot: no window, no state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, values, name in zip(
        figure.subplots(1, 2), (seconds, levels_dbfs), ("duration, s", "level, dBFS RMS"), strict=True
    ):
        axes.hist(values, bins=NUM_BINS)
        axes.set_xlabel(name)
        axes.set_ylabel("clips")
    content = io.BytesIO()
    figure.savefig(content, format="png")
    storage.write_bytes(path, content.getvalue())
