"""Retrieval metrics as REFERENCES' protocol states them: pure functions of embeddings and relevance.

A query's relevant items are a set: one clip for a caption, five captions for a clip, or all that truly
match. R@k asks for the best-ranked one; AP@10 sums i / rank_i over the relevant items inside the top ten
(rank_i is the rank of the i-th found) and divides by how many could have been there. An irrelevant item
that ties with a relevant one counts as ranked above it, so a collapsed model scores zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import numpy as np
from numpy.typing import NDArray

from audiotext_dist.errors import UserError

RECALL_AT = (1, 5, 10)
MAP_AT = 10
METRICS = (*(f"R@{k}" for k in RECALL_AT), f"mAP@{MAP_AT}")


def retrieval_metrics(
    queries_QD: NDArray[np.float32], items_ID: NDArray[np.float32], relevant: Sequence[NDArray[np.int64]]
) -> dict[str, float]:
    """``{"R@1": ..., "R@5": ..., "R@10": ..., "mAP@10": ...}``, each in [0, 1]: the means over all queries.

    Args and errors: see ``check_retrieval`` and ``metrics_of_queries``.
    """
    check_retrieval(queries_QD, items_ID, relevant)
    return mean_metrics(metrics_of_queries(queries_QD, items_ID, relevant))


def mean_metrics(metrics_QM: NDArray[np.float64]) -> dict[str, float]:
    """The means over the queries, by the metric's name."""
    return dict(zip(METRICS, metrics_QM.mean(axis=0).tolist(), strict=True))


def metrics_of_queries(
    queries_QD: NDArray[np.float32],
    items_ID: NDArray[np.float32],
    relevant: Sequence[NDArray[np.int64]],
    *,
    tile_bytes: int = 1 << 26,
) -> NDArray[np.float64]:
    """Each query's METRICS, [Q, 4].

    Args:
        queries_QD, items_ID: L2-normalised embeddings; a score is their product, see ``pair_scores``.
        relevant: for each query, the distinct numbers of its relevant items, at least one.
        tile_bytes: of the score matrix, held at a time.
    """
    found_ranks: list[NDArray[np.int64]] = []
    queries_a_tile = max(1, tile_bytes // (len(items_ID) * items_ID.itemsize))
    for start in range(0, len(queries_QD), queries_a_tile):
        scores_TI = pair_scores(queries_QD[start : start + queries_a_tile], items_ID)
        found_ranks += [_ranks_in_top(row_I, relevant[start + row]) for row, row_I in enumerate(scores_TI)]
    best_rank = np.array([ranks[0] if len(ranks) else np.inf for ranks in found_ranks])
    average_precision = [
        float(np.sum(np.arange(1, len(ranks) + 1) / ranks)) / min(len(items), MAP_AT)
        for ranks, items in zip(found_ranks, relevant, strict=True)
    ]
    return np.stack([*(best_rank <= k for k in RECALL_AT), np.array(average_precision)], axis=1).astype(np.float64)


def pair_scores(queries_QD: NDArray[np.float32], items_ID: NDArray[np.float32]) -> NDArray[np.float32]:
    """Every query's product with every item, [Q, I]; a side of [rows, L, D] scores by its best frame."""
    if queries_QD.ndim == 3:
        return pair_scores(items_ID, queries_QD).T
    if items_ID.ndim == 2:
        return queries_QD @ items_ID.T
    best_QI = queries_QD @ items_ID[:, 0].T
    for frame in range(1, items_ID.shape[1]):
        np.maximum(best_QI, queries_QD @ items_ID[:, frame].T, out=best_QI)
    return best_QI


def chance_metrics(num_items: int, relevant: Sequence[NDArray[np.int64]]) -> dict[str, float]:
    """What ``retrieval_metrics`` gives in expectation when every order of the items is equally likely."""
    # Many queries share a count: the formula is worked out once for each.
    counts, how_often = np.unique([len(items) for items in relevant], return_counts=True)

    def mean(values: list[float]) -> float:
        return float(np.average(values, weights=how_often))

    recalls = {f"R@{k}": mean([_chance_recall(num_items, int(count), k) for count in counts]) for k in RECALL_AT}
    return {**recalls, f"mAP@{MAP_AT}": mean([_chance_average_precision(num_items, int(count)) for count in counts])}


def _ranks_in_top(scores_I: NDArray[np.float32], relevant: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ranks, counted from 1 and ascending, of the relevant items inside the top ten."""
    top = min(MAP_AT, len(scores_I))
    threshold = np.partition(scores_I, len(scores_I) - top)[len(scores_I) - top]
    candidates = np.flatnonzero(scores_I >= threshold)
    is_relevant = np.isin(candidates, relevant)
    order = np.lexsort((is_relevant, -scores_I[candidates]))[:top]
    return np.flatnonzero(is_relevant[order]) + 1


def _chance_recall(num_items: int, num_relevant: int, k: int) -> float:
    return 1.0 if k >= num_items else 1 - comb(num_items - num_relevant, k) / comb(num_items, k)


def _chance_average_precision(num_items: int, num_relevant: int) -> float:
    # At rank k stands a relevant item with probability R/I; given that, each of the k-1 above it is
    # relevant with probability (R-1)/(I-1).
    above = (num_relevant - 1) / max(num_items - 1, 1)
    total = sum((1 + (k - 1) * above) / k for k in range(1, min(MAP_AT, num_items) + 1))
    return num_relevant / num_items * total / min(num_relevant, MAP_AT)


def check_retrieval(
    queries_QD: NDArray[np.float32], items_ID: NDArray[np.float32], relevant: Sequence[NDArray[np.int64]]
) -> None:
    """Raise ``UserError`` where an embedding is not finite, or a query has no relevant item."""
    assert len(relevant) == len(queries_QD)
    for name, embeddings in (("query", queries_QD), ("item", items_ID)):
        broken = np.flatnonzero(~np.isfinite(embeddings).reshape(len(embeddings), -1).all(axis=1))
        if len(broken):
            raise UserError(
                f"{len(broken)} {name} embeddings are not finite, the first at row {broken[0]}: "
                "this model cannot be evaluated"
            )
    empty = [row for row, items in enumerate(relevant) if not len(items)]
    if empty:
        raise UserError(f"{len(empty)} queries have no relevant item, the first at row {empty[0]}: mend the set")
