"""Metrics against literal cases, a plain second implementation, trec_eval, and chance by drawing."""

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from audiotext_dist.errors import UserError
from audiotext_dist.evaluation.metrics import (
    chance_metrics,
    mean_metrics,
    metrics_of_queries,
    pair_scores,
    retrieval_metrics,
)


def ids(*lists):
    return [np.array(numbers, np.int64) for numbers in lists]


def with_scores(scores):
    """Embeddings whose products are these scores: items are unit vectors."""
    scores = np.array(scores, np.float32)
    return scores, np.eye(scores.shape[1], dtype=np.float32)


def plain(scores, relevant):
    """The protocol's words, item by item."""
    best, precisions = [], []
    for row, wanted in zip(scores, relevant, strict=True):
        order = sorted(range(len(row)), key=lambda item: (-row[item], item in wanted))
        ranks = [rank for rank, item in enumerate(order, 1) if item in wanted]
        best.append(ranks[0])
        hits = [rank for rank in ranks if rank <= 10]
        precisions.append(sum(number / rank for number, rank in enumerate(hits, 1)) / min(len(wanted), 10))
    recalls = {f"R@{k}": np.mean([rank <= k for rank in best]) for k in (1, 5, 10)}
    return {**recalls, "mAP@10": np.mean(precisions)}


def test_one_relevant_item_is_found_at_its_rank():
    queries, items = with_scores([[9, 8, 7, 6, 5, 4], [9, 8, 7, 6, 5, 4]])
    found = retrieval_metrics(queries, items, ids([0], [2]))
    assert found == pytest.approx({"R@1": 0.5, "R@5": 1.0, "R@10": 1.0, "mAP@10": (1 + 1 / 3) / 2})


def test_five_captions_sum_i_over_rank_and_divide_by_five():
    queries, items = with_scores([list(range(20, 0, -1))])
    found = retrieval_metrics(queries, items, ids([1, 3, 8, 12, 15]))  # ranks 2, 4, 9, 13, 16
    assert found["mAP@10"] == pytest.approx((1 / 2 + 2 / 4 + 3 / 9) / 5)
    assert found["R@1"] == 0
    assert found["R@5"] == 1


def test_rank_eleven_counts_nothing():
    queries, items = with_scores([list(range(20, 0, -1))])
    assert set(retrieval_metrics(queries, items, ids([10])).values()) == {0.0}


def test_a_collapsed_model_scores_zero():
    queries, items = with_scores(np.ones((4, 30)))
    assert set(retrieval_metrics(queries, items, ids([0], [9], [17], [29])).values()) == {0.0}


@st.composite
def cases(draw):
    num_queries, num_items = draw(st.integers(1, 6)), draw(st.integers(1, 25))
    # Few distinct values: ties are frequent.
    scores = draw(
        st.lists(
            st.lists(st.integers(0, 6), min_size=num_items, max_size=num_items),
            min_size=num_queries,
            max_size=num_queries,
        )
    )
    wanted = st.sets(st.integers(0, num_items - 1), min_size=1)
    return scores, [sorted(draw(wanted)) for _ in range(num_queries)]


@settings(deadline=None, max_examples=200)
@given(cases(), st.integers(1, 4))
def test_it_is_the_plain_reading_of_the_protocol(case, queries_a_tile):
    scores, relevant = case
    queries, items = with_scores(scores)
    tile_bytes = queries_a_tile * items[:, 0].nbytes
    found = mean_metrics(metrics_of_queries(queries, items, ids(*relevant), tile_bytes=tile_bytes))
    assert found == pytest.approx(plain(scores, relevant))


@settings(deadline=None, max_examples=200)
@given(cases())
def test_trec_eval_says_the_same(case):
    # It breaks ties by the items' names, the last in the alphabet first: ours are named such that a stranger comes
    # before a relevant item, as the protocol has it. Its AP@10 divides by all relevant items, ours by ten at most.
    scores, relevant = case
    run, truth = {}, {}
    for query, (row, wanted) in enumerate(zip(scores, relevant, strict=True)):
        names = [("a" if item in wanted else "b") + f"{item:03d}" for item in range(len(row))]
        run[f"{query}"] = dict(zip(names, map(float, row), strict=True))
        truth[f"{query}"] = {names[item]: 1 for item in wanted}
    judged = pytrec_eval.RelevanceEvaluator(truth, {"success.1,5,10", "map_cut.10"}).evaluate(run)
    expected_QM = [
        [*(judged[f"{query}"][f"success_{k}"] for k in (1, 5, 10)), judged[f"{query}"]["map_cut_10"] * share]
        for query, share in enumerate(max(1.0, len(wanted) / 10) for wanted in relevant)
    ]
    np.testing.assert_allclose(metrics_of_queries(*with_scores(scores), ids(*relevant)), expected_QM, atol=1e-6)


@pytest.mark.parametrize(("num_items", "num_relevant"), [(40, 1), (40, 5), (25, 14), (6, 3), (1, 1)])
def test_chance_is_the_mean_over_random_orders(num_items, num_relevant):
    random = np.random.default_rng(0)
    scores = random.random((6000, num_items), dtype=np.float32)
    relevant = [random.choice(num_items, num_relevant, replace=False) for _ in scores]
    found = retrieval_metrics(*with_scores(scores), relevant)
    chance = chance_metrics(num_items, relevant)
    assert chance == pytest.approx(found, abs=0.02)


def test_embeddings_that_are_not_finite_and_queries_without_an_answer_are_errors():
    queries, items = with_scores(np.ones((2, 3)))
    with pytest.raises(UserError, match="1 item embeddings are not finite, the first at row 1"):
        retrieval_metrics(queries, np.where(np.eye(3) * [0, 1, 0], np.nan, items).astype(np.float32), ids([0], [1]))
    with pytest.raises(UserError, match="1 queries have no relevant item, the first at row 1"):
        retrieval_metrics(queries, items, ids([0], []))


@given(
    num_queries=st.integers(1, 7), num_items=st.integers(2, 9), num_frames=st.integers(1, 4), bytes_=st.integers(1, 99)
)
def test_a_side_of_frames_scores_by_its_best_one(num_queries, num_items, num_frames, bytes_):
    rng = np.random.default_rng(num_items)
    queries = rng.standard_normal((num_queries, 3), np.float32)
    frames = rng.standard_normal((num_items, num_frames, 3), np.float32)
    expected = np.array([[max(query @ frame for frame in item) for item in frames] for query in queries])
    np.testing.assert_allclose(pair_scores(queries, frames), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(pair_scores(frames, queries), pair_scores(queries, frames).T)
    wanted = [np.array([number % num_items]) for number in range(num_queries)]
    tiled = mean_metrics(metrics_of_queries(queries, frames, wanted, tile_bytes=bytes_))
    assert tiled == pytest.approx(plain(pair_scores(queries, frames), [[int(w[0])] for w in wanted]))


def test_a_frame_that_is_not_finite_is_told():
    frames = np.ones((2, 3, 4), np.float32)
    frames[1, 2, 0] = np.nan
    with pytest.raises(UserError, match="1 item embeddings are not finite, the first at row 1"):
        retrieval_metrics(np.ones((1, 4), np.float32), frames, ids([0]))
