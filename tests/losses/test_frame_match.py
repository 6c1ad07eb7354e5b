"""Which frame of a clip is its pair. The gathered batch on several ranks: ``test_contrastive``, with ``cases``."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from audiotext_dist.losses.config import LossConfig
from audiotext_dist.losses.contrastive import contrastive_loss
from audiotext_dist.losses.frame_match import match_frames, nearest_frame
from audiotext_dist.losses.targets import recording_ids
from tests.losses.cases import FRAME_CONFIGS, RECORDINGS, raw_teachers, rows
from tests.losses.naive import naive_loss
from tests.losses.test_contrastive import _Largest, assert_same, leaves, teachers


def sides(num_rows: int, num_frames: int = 3, dtype=torch.float64) -> list[torch.Tensor]:
    a = functional.normalize(rows(1, num_rows, dtype=dtype), dim=1)
    frames = rows(2, num_rows * num_frames, dtype=dtype).reshape(num_rows, num_frames, -1)
    return [a, functional.normalize(frames, dim=2)]


@settings(deadline=None, max_examples=40)
@given(
    num_rows=st.integers(1, 24),
    num_frames=st.integers(1, 4),
    name=st.sampled_from(sorted(FRAME_CONFIGS)),
    tile_bytes=st.integers(1, 20_000),
)
def test_alone_it_is_the_naive_loss(num_rows, num_frames, name, tile_bytes):
    config = dataclasses.replace(FRAME_CONFIGS[name], tile_bytes=tile_bytes)
    ours = leaves(*sides(num_rows, num_frames), *torch.tensor([[7.0], [-3.0]]).double())
    theirs = leaves(*ours)
    a, frames, scale, bias = ours
    t, _ = match_frames(a, frames, config)
    assert t.ndim == (2 if config.frame_match == "nearest" else 3)
    told = teachers()
    loss = contrastive_loss(
        a,
        t,
        scale,
        config,
        bias=bias if config.name == "sigmoid" else None,
        recording_n=recording_ids(RECORDINGS[:num_rows]),
        teachers=type(told)(*(side[:num_rows] for side in told)),
    ).loss
    told_apart = [(one[:num_rows], other[:num_rows]) for one, other in raw_teachers()]
    expected = naive_loss(config, *theirs, RECORDINGS[:num_rows], told_apart)
    used = 4 if config.name == "sigmoid" else 3
    assert_same(ours[:used], theirs[:used], loss, expected, rtol=0, atol=1e-10)


def test_the_nearest_frame_alone_learns_and_is_counted():
    a, frames = leaves(*sides(24))
    number = nearest_frame(a, frames)
    t, figures = match_frames(a, frames, LossConfig(frame_match="nearest"))
    cosines = torch.stack([functional.cosine_similarity(a, frames[:, place], dim=1) for place in range(3)], dim=1)
    assert torch.equal(number, cosines.argmax(dim=1))
    assert torch.equal(t, frames[torch.arange(24), number])
    assert {name: round(24 * share.item()) for name, share in figures.items()} == {
        f"frame_{place}_share": int((number == place).sum()) for place in range(3)
    }
    contrastive_loss(a, t, torch.ones(1).double()).loss.backward()
    assert torch.equal(frames.grad.abs().sum(dim=2) > 0, functional.one_hot(number, 3).bool())


def test_one_frame_a_clip_is_left_as_it_is():
    a, t = sides(5)[0], sides(5)[1][:, 0]
    assert match_frames(a, t, LossConfig(frame_match="nearest")) == (t, {})


def test_maximum_in_bfloat16_keeps_sums_in_float32():
    config = LossConfig(frame_match="maximum")
    a, frames = (side.float() for side in sides(24))
    ours, theirs = leaves(a, frames, torch.tensor([20.0])), leaves(a, frames, torch.tensor([20.0]))
    rounded = contrastive_loss(*ours, config, matmul_dtype=torch.bfloat16).loss
    exact = contrastive_loss(*theirs, config).loss
    assert 1e-5 < abs(rounded - exact) < 0.05
    rounded.backward()
    exact.backward()
    for own, other in zip(ours, theirs, strict=True):
        assert (own.grad - other.grad).norm() < 0.05 * other.grad.norm()


@pytest.mark.parametrize("name", ["maximum", "maximum, sigmoid"])
def test_no_tensor_is_the_batch_squared(name):
    num_rows, tile_bytes = 1000, 400_000
    config = dataclasses.replace(FRAME_CONFIGS[name], tile_bytes=tile_bytes)
    a, frames = sides(num_rows)
    bias = torch.zeros(1).double() if config.name == "sigmoid" else None
    with _Largest() as largest:
        contrastive_loss(a, frames, torch.ones(1).double(), config, bias=bias)
    assert num_rows < largest.entries <= tile_bytes // 8
