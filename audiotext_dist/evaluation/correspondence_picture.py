"""A picture of estimated correspondences: for some captions, the clips that teachers think nearest."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from audiotext_dist.evaluation.correspondences import Said

_ANNOTATED, _TRUE, _OTHER = "#e45756", "#4c78a8", "#c8c8c8"


def draw_queries(
    said: Said,
    cosine_KC: NDArray[np.float32],
    true_KC: NDArray[np.bool_] | None,
    chosen: Sequence[int],
    top: int,
    path: Path,
) -> None:
    """A panel for each chosen caption: the mean cosine of its ``top`` clips, best first.

    The clip that it was written for is marked, and so are those that it truly describes, where that is known.
    """
    figure = Figure(figsize=(9, 1.9 * len(chosen) + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(chosen), 1, squeeze=False)[:, 0]
    for axes, caption in zip(panels, chosen, strict=True):
        order = np.argsort(-cosine_KC[:, caption], kind="stable")
        shown, own = order[:top], int(said.clip_C[caption])
        colours = [_OTHER if true_KC is None or not true_KC[clip, caption] else _TRUE for clip in shown]
        rank = int(np.flatnonzero(order == own)[0]) + 1
        if rank <= len(shown):
            colours[rank - 1] = _ANNOTATED
        axes.bar(np.arange(1, len(shown) + 1), cosine_KC[shown, caption], color=colours, width=0.85)
        words = textwrap.shorten(said.captions[caption], 90, placeholder=" ...")
        axes.set_title(f"“{words}”: its own clip is number {rank} of {len(order)}", loc="left", fontsize=9)
        axes.set(xlim=(0.3, top + 0.7), ylabel="mean cosine")
        axes.grid(axis="y", alpha=0.3)
    panels[-1].set_xlabel("clips by estimated correspondence")
    told = [Patch(color=_ANNOTATED, label="the clip it was written for")]
    if true_KC is not None:
        told.append(Patch(color=_TRUE, label="another clip that it truly describes"))
    told.append(Patch(color=_OTHER, label="other clips"))
    figure.legend(handles=told, loc="outside lower center", ncols=len(told), fontsize=9, frameon=False)
    figure.savefig(path, dpi=110)
