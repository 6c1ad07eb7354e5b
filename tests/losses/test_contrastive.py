"""The one-block loss against the naive full-batch one, alone and over real ranks."""

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from audiotext_dist.losses.contrastive import contrastive_loss
from tests.ranks import run_on_ranks

NUM_ROWS, DIM = 24, 8


def unit_rows(seed: int, num_rows: int = NUM_ROWS, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(num_rows, DIM, dtype=dtype, generator=generator), dim=1)


def naive(a: torch.Tensor, t: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    logits = scale * a @ t.T
    target = torch.arange(len(logits))
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


def leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def shared_rows(rank: int, world_size: int, tile_bytes: int) -> list[torch.Tensor]:
    """Loss and gradients of one rank's rows, through a linear tower that every rank shares."""
    own = slice(rank * NUM_ROWS // world_size, (rank + 1) * NUM_ROWS // world_size)
    tower, log_scale = leaves(torch.eye(DIM, dtype=torch.float64) + 0.1, torch.full((1,), 2.0, dtype=torch.float64))
    a = functional.normalize(unit_rows(1)[own] @ tower, dim=1)
    t = functional.normalize(unit_rows(2)[own] @ tower, dim=1)
    loss = contrastive_loss(a, t, log_scale.exp(), tile_bytes=tile_bytes).loss
    loss.backward()
    return [loss.detach(), tower.grad, log_scale.grad]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("tile_rows", [1, 5, 1000])
def test_mean_over_ranks_is_the_full_batch(world_size, tile_rows):
    tile_bytes = tile_rows * NUM_ROWS * 8
    by_rank = run_on_ranks(shared_rows, world_size, world_size, tile_bytes)
    tower, log_scale = leaves(torch.eye(DIM, dtype=torch.float64) + 0.1, torch.full((1,), 2.0, dtype=torch.float64))
    a = functional.normalize(unit_rows(1) @ tower, dim=1)
    t = functional.normalize(unit_rows(2) @ tower, dim=1)
    loss = naive(a, t, log_scale.exp())
    loss.backward()
    for number, expected in enumerate([loss.detach(), tower.grad, log_scale.grad]):
        mean = torch.stack([values[number] for values in by_rank]).mean(dim=0)
        torch.testing.assert_close(mean, expected, rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(num_rows=st.integers(1, 30), tile_rows=st.integers(1, 40), scale=st.floats(0.5, 100), seed=st.integers(0, 99))
def test_alone_it_is_the_naive_loss(num_rows, tile_rows, scale, seed):
    ours = leaves(unit_rows(seed, num_rows), unit_rows(seed + 100, num_rows), torch.tensor([scale]).double())
    theirs = leaves(*ours)
    loss = contrastive_loss(*ours, tile_bytes=tile_rows * num_rows * 8).loss
    expected = naive(*theirs)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=0, atol=1e-10)


def test_it_is_open_clips_loss_in_float32():
    ours = leaves(unit_rows(1).float(), unit_rows(2).float(), torch.tensor([14.3]))
    theirs = leaves(*ours)
    loss = contrastive_loss(*ours).loss
    expected = open_clip.ClipLoss()(theirs[0], theirs[1], theirs[2])
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own.grad, other.grad)


def test_own_rank_counts_what_scores_above_the_pair():
    t = torch.eye(3)
    a = functional.normalize(torch.tensor([[1.0, 0, 0], [0.9, 0.5, 0], [0.9, 0.8, 0.1]]), dim=1)
    assert contrastive_loss(a, t, torch.ones(1)).own_rank_n.tolist() == [0, 1, 2]


def test_high_scores_do_not_overflow():
    a, t = leaves(unit_rows(1).float(), unit_rows(2).float())
    loss = contrastive_loss(a, t, torch.tensor([1e4])).loss
    loss.backward()
    assert loss.isfinite()
    assert a.grad.isfinite().all()
