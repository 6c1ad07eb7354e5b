"""PaSST, MobileNetV3 and ATST-Frame say what their authors' code says, of the same weights and sounds.

The golden values: ``formula.fill`` filled the authors' networks (hear21passt 0.0.26, its ``PaSST`` with img_size (128,
998); EfficientAT at a425fdc, its ``get_model``; audiossl at ec3a14d, its ``FrameAST`` with patches of 64 x 4, no query
bias and norms of 1e-6), which heard ``formula.sound`` through their own mel front ends without masks. Of the two
embeddings they are the first six numbers.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torchaudio.functional import resample

from audiotext_dist.errors import UserError
from audiotext_dist.models.atst import AtstConfig, AtstTower
from audiotext_dist.models.frontends import resampled
from audiotext_dist.models.mobilenet import MobileNetConfig, MobileNetTower
from audiotext_dist.models.passt import PasstConfig, PasstTower
from tests.models.formula import fill, sound

SMALL_PASST = PasstConfig(width=24, depth=2, num_heads=3)
SMALL_ATST = AtstConfig(width=24, depth=2, num_heads=3)
SMALL_MOBILENET = MobileNetConfig(width_factor=0.1)


def passt(config: PasstConfig = SMALL_PASST) -> PasstTower:
    tower = PasstTower(config, 32000).eval()
    fill(tower.transformer)
    return tower


def atst() -> AtstTower:
    tower = AtstTower(SMALL_ATST, 16000).eval()
    fill(tower.transformer)
    return tower


def mobilenet(config: MobileNetConfig = SMALL_MOBILENET) -> MobileNetTower:
    tower = MobileNetTower(config, 32000).eval()
    # In the authors' network everything but the classifier is called features.
    fill(torch.nn.ModuleDict({"features": tower.features}))
    return tower


def lengths(waveform_NS: Tensor) -> Tensor:
    return torch.full((len(waveform_NS),), waveform_NS.shape[1])


@pytest.mark.parametrize(
    ("stride", "seconds", "expected"),
    [
        (
            16,
            2.5,
            [
                [0.342546, -0.529474, -0.172329, 1.334293, -1.474187, 0.969371],
                [0.019642, -0.441532, -0.135148, 1.297192, -1.360466, 0.793106],
            ],
        ),
        (
            16,
            10.0,
            [
                [0.229779, -0.66777, -0.22462, 1.23438, -1.357433, 0.797984],
                [0.154682, -0.596596, -0.196423, 1.16273, -1.295772, 0.645474],
            ],
        ),
        (
            10,
            10.0,
            [
                [0.137255, -0.540384, -0.067575, 1.027113, -1.097935, 0.509426],
                [0.014088, -0.469808, -0.087745, 1.01097, -1.024562, 0.374831],
            ],
        ),
    ],
)
@torch.no_grad()
def test_passt_is_its_authors(stride: int, seconds: float, expected: list[list[float]]) -> None:
    waveform_NS = sound(seconds, 32000)
    found = passt(replace(SMALL_PASST, stride=stride))(waveform_NS, lengths(waveform_NS))
    torch.testing.assert_close(found[:, :6], torch.tensor(expected), atol=1e-4, rtol=0)


@torch.no_grad()
def test_mobilenet_is_its_authors() -> None:
    waveform_NS = sound(2.5, 32000)
    expected = [
        [0.029462, 0.346094, -0.268399, 0.598494, 0.102613, 0.022059],
        [0.064632, 0.369965, -0.259557, 0.585637, 0.11412, 0.036238],
    ]
    found = mobilenet()(waveform_NS, lengths(waveform_NS))
    torch.testing.assert_close(found[:, :6], torch.tensor(expected), atol=1e-4, rtol=0)


@torch.no_grad()
def test_atst_is_its_authors() -> None:
    # The authors were told that 251 and 125 frames are sound.
    waveform_NS = sound(2.5, 16000)
    expected = [
        [0.074641, 1.192419, -1.031609, -0.106309, 0.510762, 1.189242],
        [0.183872, 1.280475, -0.904568, -0.019466, 0.536945, 1.049449],
    ]
    found = atst()(waveform_NS, torch.tensor([40_000, 124 * 160]))
    torch.testing.assert_close(found[:, :6], torch.tensor(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("make", [passt, mobilenet, atst])
@torch.no_grad()
def test_a_clip_at_another_rate_is_resampled_first(make) -> None:  # type: ignore[no-untyped-def]
    tower = make()
    own_hz, other_hz = (16000, 32000) if make is atst else (32000, 16000)
    waveform_NS = (sound(1.0, other_hz) * 32767).round().to(torch.int16)
    wanted_NS = resample(waveform_NS / 32768, other_hz, own_hz)
    expected = tower(wanted_NS, lengths(wanted_NS))
    tower.sample_rate_hz = other_hz
    torch.testing.assert_close(tower(waveform_NS, lengths(waveform_NS)), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert resampled(waveform_NS, other_hz, own_hz).dtype == torch.float32


@pytest.mark.parametrize("make", [passt, atst])
def test_activations_computed_again_change_nothing(make) -> None:  # type: ignore[no-untyped-def]
    waveform_NS, gradients = sound(1.0, 32000), []
    for again in (False, True):
        tower = make().train()
        tower.transformer.grad_checkpointing = again
        tower(waveform_NS, lengths(waveform_NS), torch.full((2, 4), 0.25) if make is atst else None).sum().backward()
        gradients.append([parameter.grad for parameter in tower.parameters()])
    torch.testing.assert_close(*gradients)


def kept_columns(uniforms_N4: Tensor, config: PasstConfig) -> tuple[Tensor, Tensor]:
    """Which columns and rows of patches each clip keeps, bool, read off what the patches' gradient reaches."""
    network = passt(config).transformer
    seen: list[Tensor] = []

    def keep(_module: object, _inputs: object, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[0]

    network.patch_embed["proj"].register_forward_hook(keep)
    network(torch.zeros(len(uniforms_N4), 1, 128, 998), uniforms_N4).square().sum().backward()
    assert seen[0].grad is not None
    reached_NFT = seen[0].grad.abs().sum(dim=1) > 0
    return reached_NFT.any(dim=1), reached_NFT.any(dim=2)


def test_patchout_leaves_out_columns_and_rows_that_belong_to_the_clip() -> None:
    uniforms_N4 = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
    columns_NT, rows_NF = kept_columns(uniforms_N4, SMALL_PASST)
    assert (columns_NT.shape, rows_NF.shape) == ((6, 62), (6, 8))
    assert columns_NT.sum(dim=1).tolist() == [62 - 15] * 6
    assert rows_NF.sum(dim=1).tolist() == [8 - 2] * 6
    assert len({tuple(row) for row in columns_NT.tolist()}) == 6, "each clip has its own"
    alone_1T, alone_1F = kept_columns(uniforms_N4[4:5], SMALL_PASST)
    assert torch.equal(alone_1T[0], columns_NT[4])
    assert torch.equal(alone_1F[0], rows_NF[4])


def test_patchout_reaches_every_column_equally_often() -> None:
    uniforms_N4 = torch.rand(150, 4, generator=torch.Generator().manual_seed(1))
    columns_NT, rows_NF = kept_columns(uniforms_N4, replace(SMALL_PASST, width=3, depth=1))
    # Within four standard deviations of their expectation.
    assert (columns_NT.float().mean(dim=0) - 47 / 62).abs().max() < 4 * (47 / 62 * 15 / 62 / 150) ** 0.5
    assert (rows_NF.float().mean(dim=0) - 6 / 8).abs().max() < 4 * (6 / 8 * 2 / 8 / 150) ** 0.5


def test_atst_hears_nothing_after_the_clips_end() -> None:
    tower, waveform_NS = atst(), sound(2.0, 16000)
    waveform_NS[:, 16000:] = 0
    short_N = torch.tensor([16000, 16000])
    with torch.no_grad():
        padded, alone = tower(waveform_NS, short_N), tower(waveform_NS[:, :17600], short_N)
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=0)


def test_fixed_statistics_leave_a_clip_to_itself_and_batch_statistics_move() -> None:
    waveform_NS = sound(1.0, 32000, num_clips=3)
    fixed, moving = mobilenet().train(), mobilenet(replace(SMALL_MOBILENET, batch_norm="batch")).train()
    before = {name: buffer.clone() for name, buffer in fixed.features.named_buffers()}
    torch.testing.assert_close(
        fixed(waveform_NS, lengths(waveform_NS))[:1], fixed(waveform_NS[:1], lengths(waveform_NS)[:1])
    )
    moving(waveform_NS, lengths(waveform_NS))
    assert all(torch.equal(buffer, before[name]) for name, buffer in fixed.features.named_buffers())
    assert not any(torch.equal(buffer, before[name]) for name, buffer in moving.features.named_buffers())
    assert not moving.eval().features.training


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PasstConfig(patchout_time=62), r"passt.patchout_time=62 must be from 0 to 61"),
        (lambda: PasstConfig(patchout_frequency=-1), r"passt.patchout_frequency=-1"),
        (lambda: MobileNetConfig(width_factor=0), r"mobilenet.width_factor=0"),
        (lambda: AtstConfig(depth=0), r"atst.depth=0"),
    ],
)
def test_impossible_sizes_are_refused_by_their_key(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=message):
        make()
