from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from audiotext_dist.models.uniforms import more_uniforms
from audiotext_dist.models.windows import Windows


class Tower(nn.Module):
    """An embedding of what it is given, uniforms and lengths included; it counts the windows that it hears."""

    def __init__(self, window_samples: int) -> None:
        super().__init__()
        torch.manual_seed(window_samples)
        self.weight = nn.Parameter(torch.randn(window_samples + 5, 3, dtype=torch.float64))
        self.num_heard = 0

    def forward(self, waveform_NS: Tensor, num_valid_N: Tensor, uniforms_N4: Tensor | None = None) -> Tensor:
        self.num_heard += len(waveform_NS)
        uniforms_N4 = torch.zeros(len(waveform_NS), 4) if uniforms_N4 is None else uniforms_N4
        read = torch.cat([waveform_NS.double(), num_valid_N[:, None], uniforms_N4.double()], dim=1)
        return (read @ self.weight).tanh()


def expected_of(tower: Tower, clip_S: Tensor, num_valid: int, uniforms_4: Tensor | None, windows: Windows) -> Tensor:
    """One clip, one window after the other."""
    size, hop = windows.window_samples, windows.hop_samples
    count = 1 + max(0, math.ceil((num_valid - size) / hop))
    embeddings = []
    for number in range(count):
        window_S = torch.zeros(size, dtype=clip_S.dtype)
        part_S = clip_S[number * hop : number * hop + size]
        window_S[: len(part_S)] = part_S
        own = uniforms_4 if uniforms_4 is None else uniforms_4[None]
        if own is not None and number:
            own = more_uniforms(own, 4, stream=number)
        embeddings.append(tower(window_S[None], torch.tensor([min(size, num_valid - number * hop)]), own)[0])
    return torch.stack(embeddings).mean(dim=0)


@settings(deadline=None, max_examples=60)
@given(
    size=st.integers(1, 12), data=st.data(), num_samples=st.integers(1, 40), training=st.booleans(), n=st.integers(1, 4)
)
def test_a_clip_is_the_mean_of_its_windows_with_sound(
    size: int, data: st.DataObject, num_samples: int, training: bool, n: int
) -> None:
    windows = Windows(window_samples=size, hop_samples=data.draw(st.integers(1, size)))
    valid = data.draw(st.lists(st.integers(0, num_samples), min_size=n, max_size=n))
    clips = torch.randint(-99, 99, (n, num_samples), dtype=torch.int16)
    for clip, num_valid in zip(clips, valid, strict=True):
        clip[num_valid:] = 0
    uniforms = torch.rand(n, 4) if training else None
    tower = Tower(size)
    found = windows.mean(tower, clips, torch.tensor(valid), uniforms)
    counted = tower.num_heard
    expected = torch.stack(
        [expected_of(tower, clips[i], valid[i], None if uniforms is None else uniforms[i], windows) for i in range(n)]
    )
    torch.testing.assert_close(found, expected.float(), atol=1e-6, rtol=0)
    assert counted == tower.num_heard - counted, "no window of padding alone is heard"
    (own,) = torch.autograd.grad(found.square().sum(), tower.weight)
    (reference,) = torch.autograd.grad(expected.float().square().sum(), tower.weight)
    torch.testing.assert_close(own, reference, atol=1e-5, rtol=1e-5)


def test_ten_of_thirty_seconds_cost_a_third() -> None:
    windows, tower = Windows(window_samples=10, hop_samples=10), Tower(10)
    windows.mean(tower, torch.zeros(3, 30, dtype=torch.int16), torch.tensor([10, 30, 11]))
    assert tower.num_heard == 1 + 3 + 2


def test_one_window_is_no_window() -> None:
    tower, uniforms = Tower(10), torch.rand(2, 4)
    clips, valid = torch.randint(-99, 99, (2, 10), dtype=torch.int16), torch.tensor([10, 7])
    found = Windows(window_samples=10, hop_samples=10).mean(tower, clips, valid, uniforms)
    torch.testing.assert_close(found, tower(clips, valid, uniforms).float())


def test_further_uniforms_are_uniform_unlike_and_their_clips_own() -> None:
    uniforms = torch.rand(500, 4, generator=torch.Generator().manual_seed(0))
    found = more_uniforms(uniforms, 64, stream=1)
    assert found.dtype == torch.float32
    assert 0 <= found.min() < 0.001
    assert 0.999 < found.max() < 1
    # 32,000 of them in 16 bins, within five standard deviations.
    counts = torch.histc(found, 16, 0, 1)
    assert (counts - 2000).abs().max() < 5 * 2000**0.5
    other = more_uniforms(uniforms, 64, stream=2)
    for one in (other, found.roll(1, 0), found.roll(1, 1)):
        correlation = torch.corrcoef(torch.stack([found.flatten(), one.flatten()]))[0, 1]
        assert correlation.abs() < 5 / 32000**0.5
    assert torch.equal(more_uniforms(uniforms[7:8], 64, stream=torch.tensor([1])), found[7:8])


@pytest.mark.parametrize("bit", range(4))
def test_each_of_the_four_numbers_counts(bit: int) -> None:
    uniforms = torch.full((1, 4), 0.5)
    changed = uniforms.clone()
    changed[0, bit] += 2**-24
    assert not torch.equal(more_uniforms(uniforms, 4, 1), more_uniforms(changed, 4, 1))
