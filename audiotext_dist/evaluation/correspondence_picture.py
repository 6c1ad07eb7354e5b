"""A picture of estimated correspondences: the clips that teachers think nearest to some captions, and the targets."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from audiotext_dist.evaluation.correspondence_pairs import PairJudgement
from audiotext_dist.evaluation.correspondences import Said

_ANNOTATED, _TRUE, _OTHER = "#f08a85", "#8fb3d9", "#d4d4d4"


def draw_queries(
    said: Said,
    cosine_KC: NDArray[np.float32],
    true_KC: NDArray[np.bool_] | None,
    chosen: Sequence[int],
    pairs: Sequence[PairJudgement],
    top: int,
    path: Path,
) -> None:
    """Two panels for each chosen caption: its ``top`` clips by mean cosine, and the target of its own clip.

    The clip that it was written for is marked, and so are those that it truly describes, where that is known; beside
    it the captions of a batch with most of the target's mass, in the same colours.
    """
    figure = Figure(figsize=(15, 1.9 * len(chosen) + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(chosen), 2, squeeze=False, width_ratios=(3, 1))
    for (left, right), caption, pair in zip(panels, chosen, pairs, strict=True):
        _draw_clips(left, said, cosine_KC[:, caption], None if true_KC is None else true_KC[:, caption], caption, top)
        _draw_target(right, pair)
    panels[-1, 0].set_xlabel("clips by estimated correspondence")
    panels[-1, 1].set_xlabel("per cent of the target's mass")
    told = [Patch(color=_ANNOTATED, label="written for each other")]
    if true_KC is not None:
        told.append(Patch(color=_TRUE, label="truly belong together"))
    told.append(Patch(color=_OTHER, label="others"))
    figure.legend(handles=told, loc="outside lower center", ncols=len(told), fontsize=9, frameon=False)
    figure.savefig(path, dpi=110)


def _draw_clips(
    axes: Axes, said: Said, cosine_K: NDArray[np.float32], true_K: NDArray[np.bool_] | None, caption: int, top: int
) -> None:
    order, own = np.argsort(-cosine_K, kind="stable"), int(said.clip_C[caption])
    shown, rank = order[:top], int(np.flatnonzero(order == own)[0]) + 1
    colours = [_colour(clip == own, true_K is not None and bool(true_K[clip])) for clip in shown]
    axes.bar(np.arange(1, len(shown) + 1), cosine_K[shown], color=colours, width=0.85)
    words = textwrap.shorten(said.captions[caption], 90, placeholder=" ...")
    axes.set_title(f"“{words}”: its own clip is number {rank} of {len(order)}", loc="left", fontsize=9)
    axes.set(xlim=(0.3, top + 0.7), ylabel="mean cosine")
    axes.grid(axis="y", alpha=0.3)


def _draw_target(axes: Axes, pair: PairJudgement) -> None:
    places = range(len(pair.most_mass))
    colours = [_colour(each.is_annotated, bool(each.is_true)) for each in pair.most_mass]
    axes.barh(places, [100 * each.mass for each in pair.most_mass], color=colours, height=0.8)
    for place, each in zip(places, pair.most_mass, strict=True):
        words = textwrap.shorten(each.caption, 50, placeholder=" ...")
        axes.text(0.02, place, words, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    known = "" if pair.mass_true is None else f", {100 * pair.mass_true:.1f} % on true ones"
    axes.set_title(f"its clip: {100 * pair.mass_annotated:.1f} % on its caption{known}", loc="left", fontsize=9)
    axes.set_yticks([])
    axes.invert_yaxis()


def _colour(is_annotated: bool, is_true: bool) -> str:
    return _ANNOTATED if is_annotated else _TRUE if is_true else _OTHER
