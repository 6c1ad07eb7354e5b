"""The loss family against the naive losses of the whole batch, and against others' losses."""

import dataclasses
import os
import subprocess
import sys

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.losses import NTXentLoss, SupConLoss
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from audiotext_dist.losses import softmax
from audiotext_dist.losses.block import Block
from audiotext_dist.losses.config import LossConfig
from audiotext_dist.losses.contrastive import Teachers, contrastive_loss
from audiotext_dist.losses.targets import join_teachers, recording_ids
from tests.losses.cases import CONFIGS, DIM, NUM_ROWS, RECORDINGS, distance, on_four_ranks, raw_teachers, rows
from tests.losses.naive import naive_figures, naive_loss
from tests.ranks import run_on_ranks


def unit_rows(seed: int, num_rows: int = NUM_ROWS, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return functional.normalize(rows(seed, num_rows, dtype=dtype), dim=1)


def leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def teachers() -> Teachers:
    return Teachers(*(join_teachers(side) for side in zip(*raw_teachers(), strict=True)))


def assert_same(ours, theirs, loss, expected, **tolerance) -> None:
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, **tolerance)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own.grad, other.grad, **tolerance)


@pytest.fixture(scope="module")
def found_on_ranks():
    return run_on_ranks(on_four_ranks, 4)


@pytest.mark.parametrize(
    ("kind", "tolerance"), [("naive", 1e-10), ("uneven", 1e-10), ("gather", 0), ("open_clip", 1e-5)]
)
def test_mean_over_ranks_is_the_whole_batch(found_on_ranks, kind, tolerance):
    errors = [each for of_rank in found_on_ranks for each in of_rank[kind]]
    assert errors
    assert [each for each in errors if not each[1] <= tolerance] == []
    print(f"{kind}: at most {max(error for _, error in errors):.1e}, of {len(errors)} errors")


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_gradient_that_is_no_number_is_far_from_every_other(place):
    right, found = ([torch.ones(()), torch.ones(3), torch.ones(2, 2)] for _ in range(2))
    found[place].view(-1)[-1] = torch.nan
    assert not distance((found[0], found[1:]), (right[0], right[1:])) <= 1e9


@settings(deadline=None, max_examples=60)
@given(
    num_rows=st.integers(1, NUM_ROWS),
    name=st.sampled_from(sorted(CONFIGS)),
    tile_bytes=st.integers(1, 20_000),
    scale=st.floats(0.5, 100),
    factor=st.floats(0.1, 10),
)
def test_alone_it_is_the_naive_loss(num_rows, name, tile_bytes, scale, factor):
    config = dataclasses.replace(CONFIGS[name], tile_bytes=tile_bytes)
    ours = leaves(unit_rows(1, num_rows), unit_rows(2, num_rows), *torch.tensor([[scale], [-3.0]]).double())
    theirs = leaves(*ours)
    sigmoid = config.name == "sigmoid"
    ids = recording_ids(RECORDINGS[:num_rows])
    told = Teachers(*(side[:num_rows] for side in teachers()))
    loss = contrastive_loss(*ours[:3], config, bias=ours[3] if sigmoid else None, recording_n=ids, teachers=told).loss
    told_apart = [(a[:num_rows], b[:num_rows]) for a, b in raw_teachers()]
    expected = naive_loss(config, *theirs, RECORDINGS[:num_rows], told_apart)
    used = 4 if sigmoid else 3
    assert_same(ours[:used], theirs[:used], factor * loss, factor * expected, rtol=0, atol=1e-10)


def test_it_is_open_clips_loss_in_float32():
    ours = leaves(unit_rows(1).float(), unit_rows(2).float(), torch.tensor([14.3]))
    theirs = leaves(*ours)
    assert_same(ours, theirs, contrastive_loss(*ours).loss, open_clip.ClipLoss()(*theirs))


def test_one_direction_is_an_independent_nt_xent_in_float32():
    ids = recording_ids(RECORDINGS)
    for form, other in (("left_out", NTXentLoss(1 / 14.3)), ("mean_a_row", SupConLoss(1 / 14.3))):
        ours = leaves(rows(1).float(), rows(2).float())
        theirs = leaves(*ours)
        config = LossConfig(
            pair_weight=0, recording_weight=1, recording_form=form, direction="first_to_second", tile_bytes=1000
        )
        unit = [functional.normalize(side, dim=1) for side in ours]  # as the other one does inside
        loss = contrastive_loss(*unit, torch.tensor([14.3]), config, recording_n=ids).loss
        pairs = None
        if form == "left_out":  # own pairs attract, clips of other recordings repel
            own = torch.arange(NUM_ROWS)
            pairs = (own, own, *torch.where(ids[:, None] != ids))
        labels = ids.unique(return_inverse=True)[1]
        # Given the very same labels twice, it takes the two sides for one and leaves the own pairs out.
        expected = other(theirs[0], labels, indices_tuple=pairs, ref_emb=theirs[1], ref_labels=labels.clone())
        assert_same(ours, theirs, loss, expected)


def test_matmuls_in_bfloat16_keep_sums_in_float32():
    a, t, scale = unit_rows(1).float(), unit_rows(2).float(), torch.tensor([20.0])
    rounded = [(scale * a).bfloat16().double(), t.bfloat16().double()]
    loss = contrastive_loss(a, t, scale, matmul_dtype=torch.bfloat16).loss
    exact = naive_loss(LossConfig(), *rounded, torch.ones(1).double())
    assert abs(loss - exact) < 1e-5
    assert abs(loss - contrastive_loss(a, t, scale).loss) > 1e-5
    ours, theirs = leaves(a, t, scale), leaves(a, t, scale)
    contrastive_loss(*ours, matmul_dtype=torch.bfloat16).loss.backward()
    contrastive_loss(*theirs).loss.backward()
    for own, other in zip(ours, theirs, strict=True):
        assert (own.grad - other.grad).norm() < 0.02 * other.grad.norm()


def test_where_products_cannot_be_written_in_place_the_tile_leaves_room_for_them():
    # As a GPU would; this device computes nothing.
    x_nD, t_ND = torch.empty(100, DIM, device="meta"), torch.empty(1000, DIM, device="meta", dtype=torch.bfloat16)
    rows_of = {}
    for dtype in (torch.float32, torch.bfloat16):
        tile, buffers = next(Block(x_nD, t_ND.to(dtype)).tiles(120_000, num_buffers=2, extra_bytes=0))
        rows_of[dtype] = tile.stop
        assert [buffer.shape for buffer in buffers] == [(tile.stop, 1000)] * 2
    assert rows_of == {torch.float32: 15, torch.bfloat16: 10}


class _Largest(TorchDispatchMode):
    """Entries of the largest tensor that any operation makes."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.entries = max(
            [
                self.entries,
                *(one.numel() for one in torch.utils._pytree.tree_leaves(made) if isinstance(one, torch.Tensor)),
            ]
        )
        return made


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_no_tensor_is_the_batch_squared(name):
    num_rows, tile_bytes = 1000, 400_000
    config = dataclasses.replace(CONFIGS[name], tile_bytes=tile_bytes)
    sides = [functional.normalize(rows(seed, num_rows), dim=1) for seed in range(4)]
    bias = torch.zeros(1).double() if config.name == "sigmoid" else None
    ids = torch.arange(num_rows) // 3
    with _Largest() as largest:
        told = Teachers(sides[2], sides[3])
        contrastive_loss(*sides[:2], torch.ones(1).double(), config, bias=bias, recording_n=ids, teachers=told)
    # All buffers of a tile are one tensor.
    assert num_rows < largest.entries <= tile_bytes // 8


def test_figures_of_the_batch():
    config = LossConfig(recording_weight=1.0, teacher_weight=2.0)
    a, t = unit_rows(1), unit_rows(2)
    output = contrastive_loss(
        a, t, torch.tensor([5.0]).double(), config, recording_n=recording_ids(RECORDINGS), teachers=teachers()
    )
    figures = {name: value.item() for name, value in output.figures.items()}
    cosine = torch.stack([functional.normalize(x, dim=1) @ functional.normalize(y, dim=1).T for x, y in raw_teachers()])
    target, scores = cosine.mean(dim=0) / config.teacher_temperature, 5.0 * a @ t.T
    both_ways = [(target.log_softmax(1), scores.log_softmax(1)), (target.T.log_softmax(1), scores.T.log_softmax(1))]
    entropy = sum(-(p.exp() * p).sum(1).mean() for p, _ in both_ways) / 2
    divergence = sum(functional.kl_div(q, p, log_target=True, reduction="batchmean") for p, q in both_ways) / 2
    assert figures["teacher_entropy"] == pytest.approx(entropy.item())
    assert figures["teacher_kl"] == pytest.approx(divergence.item())
    assert figures["positives_a_row"] == pytest.approx(sum(RECORDINGS.count(name) for name in RECORDINGS) / NUM_ROWS)
    assert output.loss.item() == pytest.approx(
        figures["pair_loss"] + figures["recording_loss"] + 2 * figures["teacher_loss"]
    )


@settings(deadline=None, max_examples=40)
@given(
    hot_a=st.lists(st.integers(0, DIM - 1), min_size=1, max_size=12),
    hot_t=st.lists(st.integers(0, DIM - 1), min_size=12, max_size=12),
    name=st.sampled_from(["softmax", "sigmoid"]),
    tile_bytes=st.integers(1, 1000),
)
def test_of_a_tie_no_pair_is_found(hot_a, hot_t, name, tile_bytes):
    """Rows of one 1: every cosine is exactly 0 or 1."""
    a, t = (torch.eye(DIM).double()[torch.tensor(hot[: len(hot_a)])] for hot in (hot_a, hot_t))
    scale, bias = torch.tensor([5.0]).double(), torch.zeros(1).double() if name == "sigmoid" else None
    config = LossConfig(name=name, tile_bytes=tile_bytes)
    figures = contrastive_loss(a, t, scale, config, bias=bias).figures
    expected = naive_figures(config, a, t, scale, bias, None, None)
    for figure in ("recall_at_1", "reverse_recall_at_1"):
        torch.testing.assert_close(figures[figure], expected[figure])


def test_towers_that_say_the_same_of_every_clip_find_none():
    same = torch.eye(DIM)[:1].expand(9, DIM)
    for a, t in ((same, same), (same, rows(1, 9).float()), (rows(1, 9).float(), same)):
        figures = contrastive_loss(a, t, torch.tensor([5.0])).figures
        assert min(figures["recall_at_1"], figures["reverse_recall_at_1"]) == 0
    alone = contrastive_loss(same[:1], same[:1], torch.tensor([5.0])).figures
    assert alone["recall_at_1"] == alone["reverse_recall_at_1"] == 1


@pytest.mark.parametrize(("direction", "num_joined"), [("first_to_second", 0), ("second_to_first", 2), ("both", 2)])
def test_no_logsumexp_of_columns_that_weigh_nothing_crosses_the_ranks(monkeypatch, direction, num_joined):
    joined = []
    monkeypatch.setattr(softmax, "logsumexp_over_ranks", lambda own_N, layout: joined.append(1) or own_N)
    config = LossConfig(direction=direction, teacher_weight=1.0)
    contrastive_loss(unit_rows(1), unit_rows(2), torch.ones(1).double(), config, teachers=teachers())
    assert len(joined) == num_joined


def test_recordings_have_the_same_number_in_every_process():
    script = f"from audiotext_dist.losses.targets import recording_ids as i; print(i({RECORDINGS}).tolist())"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    said = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True)
    assert said.stdout.decode().strip() == str(recording_ids(RECORDINGS).tolist())
    assert len(set(recording_ids(RECORDINGS).tolist())) == len(set(RECORDINGS))


def test_teachers_joined_have_the_mean_cosine_as_product():
    (a, t), expected = teachers(), 0
    for x, y in raw_teachers():
        expected = expected + functional.cosine_similarity(x[:, None], y[None], dim=2) / 2
    torch.testing.assert_close(a @ t.T, expected)


def test_high_scores_do_not_overflow():
    a, t = leaves(unit_rows(1).float(), unit_rows(2).float())
    loss = contrastive_loss(a, t, torch.tensor([1e4])).loss
    loss.backward()
    assert loss.isfinite()
    assert a.grad.isfinite().all()


def test_a_batch_of_masked_rows_says_nothing():
    a, t = leaves(unit_rows(1), unit_rows(2))
    for config in CONFIGS.values():
        bias = torch.zeros(1).double() if config.name == "sigmoid" else None
        output = contrastive_loss(
            a,
            t,
            torch.ones(1).double(),
            config,
            bias=bias,
            recording_n=recording_ids(RECORDINGS),
            teachers=teachers(),
            is_valid_n=torch.zeros(NUM_ROWS, dtype=torch.bool),
        )
        output.loss.backward()
        assert output.loss == 0
    assert a.grad.shape == (NUM_ROWS, DIM)
    assert not a.grad.any()
