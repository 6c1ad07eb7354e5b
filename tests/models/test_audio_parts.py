"""An audio tower that gives an embedding for each part of a clip's sound."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from audiotext_dist.errors import UserError
from audiotext_dist.models.audio import AudioTower, AudioTowerConfig, create_audio_tower, cut_segments, part_shares
from audiotext_dist.models.dual_encoder import ModelConfig, build_model, unit_length
from audiotext_dist.models.frontends import FbankConfig
from audiotext_dist.models.image import ImageTowerConfig
from audiotext_dist.models.text import TextTowerConfig

SAMPLE_RATE_HZ = 16000
CONFIG = AudioTowerConfig(
    name="tiny-audio-32",
    stride_frames=16,
    stride_bins=24,
    num_outputs=4,
    fbank=FbankConfig(num_fbank_frames=200, time_mask_frames=0, freq_mask_bins=0),
)


def waveforms(*num_valid: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    waveform_NS = torch.randint(-9999, 9999, (len(num_valid), 32400), generator=generator, dtype=torch.int16)
    for row, count in enumerate(num_valid):
        waveform_NS[row, count:] = 0
    return waveform_NS, torch.tensor(num_valid)


@pytest.fixture(scope="module")
def tower() -> AudioTower:
    torch.manual_seed(0)
    tower = create_audio_tower(CONFIG, SAMPLE_RATE_HZ).eval()
    with torch.no_grad():  # at its start it is too small to matter
        tower.transformer.positional_embedding.mul_(30)
    return tower


@given(num_valid=st.integers(0, 23), num_segments=st.integers(1, 5))
def test_segments_are_the_equal_parts_of_the_sound(num_valid: int, num_segments: int) -> None:
    fbank_NTF = 1 + torch.arange(23 * 2.0).reshape(1, 23, 2)
    found = cut_segments(fbank_NTF, torch.tensor([num_valid]), num_segments)[0]
    assert found.shape == (num_segments, math.ceil(23 / num_segments), 2)
    edges = [num_valid * segment // num_segments for segment in range(num_segments + 1)]
    for segment, (start, end) in enumerate(itertools.pairwise(edges)):
        assert torch.equal(found[segment, : end - start], fbank_NTF[0, start:end])
        assert not found[segment, end - start :].any()


@given(num_valid=st.integers(1, 12), num_parts=st.integers(1, 5))
def test_parts_share_the_places_that_hold_sound(num_valid: int, num_parts: int) -> None:
    share_LG = part_shares(torch.tensor([num_valid]), num_parts, 12)[0]
    torch.testing.assert_close(share_LG.sum(dim=1), torch.ones(num_parts))
    assert not share_LG[:, num_valid:].any()
    assert (share_LG[:, :num_valid].sum(dim=0) > 0).all()
    if num_valid % num_parts == 0:
        width = num_valid // num_parts
        expected = torch.eye(num_parts).repeat_interleave(width, dim=1) / width
        torch.testing.assert_close(share_LG[:, :num_valid], expected)


@torch.no_grad()
def test_a_segment_is_encoded_as_a_clip_of_its_own(tower: AudioTower) -> None:
    waveform_NS, num_valid_N = waveforms(32400, 20000)
    found_NLD = tower(waveform_NS, num_valid_N)
    assert found_NLD.shape == (2, 4, 128)
    alone = create_audio_tower(
        replace(CONFIG, num_outputs=1, fbank=replace(CONFIG.fbank, num_fbank_frames=50)), SAMPLE_RATE_HZ
    ).eval()
    weights = tower.transformer.state_dict()
    grid = weights["positional_embedding"][1:].T.reshape(1, 128, 11, 5)
    resized = nn.functional.interpolate(grid, (2, 5), mode="bilinear", align_corners=False, antialias=True)
    weights["positional_embedding"] = torch.cat([weights["positional_embedding"][:1], resized.flatten(2)[0].T])
    alone.transformer.load_state_dict(weights)
    segments = cut_segments(
        tower.fbank(waveform_NS, num_valid_N)[:, 0], tower.fbank.is_valid_frame(num_valid_N).sum(dim=1), 4
    )
    for number in range(4):
        torch.testing.assert_close(found_NLD[:, number], alone.transformer(segments[:, number, None]))


@torch.no_grad()
def test_a_segment_hears_nothing_of_the_others(tower: AudioTower) -> None:
    waveform_NS, num_valid_N = waveforms(32400)
    before = tower(waveform_NS, num_valid_N)[0]
    waveform_NS[:, 18000:22000] //= 2  # well inside the third quarter
    changed = (tower(waveform_NS, num_valid_N)[0] - before).abs().amax(dim=1) > 1e-4
    assert changed.tolist() == [False, False, True, False]


@torch.no_grad()
def test_tokens_of_a_clip_are_averaged_by_parts(tower: AudioTower) -> None:
    pooled = create_audio_tower(replace(CONFIG, outputs="tokens"), SAMPLE_RATE_HZ).eval()
    pooled.load_state_dict(tower.state_dict())
    waveform_NS, num_valid_N = waveforms(32400, 12000)
    transformer = pooled.transformer
    tokens = transformer.transformer(transformer._embeds(pooled.fbank(waveform_NS, num_valid_N)))[:, 1:]
    tokens = tokens.reshape(2, 11, 5, 128).mean(dim=2)
    found = pooled(waveform_NS, num_valid_N)
    # 200 frames are 11 places in time; 73 whole frames of sound are 3.
    for row, places in ((0, [(0, 3), (2, 6), (5, 9), (8, 11)]), (1, [(0, 1), (0, 2), (1, 3), (2, 3)])):
        for part, (start, end) in enumerate(places):
            expected = transformer.ln_post(tokens[row, start:end].mean(dim=0)) @ transformer.proj
            torch.testing.assert_close(found[row, part], expected)


@pytest.mark.parametrize("outputs", ["segments", "tokens"])
def test_every_weight_learns_and_fits_a_tower_of_one_output(outputs: str) -> None:
    several = create_audio_tower(replace(CONFIG, outputs=outputs), SAMPLE_RATE_HZ)
    several(*waveforms(32400)).square().sum().backward()
    for name, parameter in several.named_parameters():
        assert parameter.grad is not None, name
    assert several.transformer.positional_embedding.grad.abs().amin(dim=1).min() > 0
    create_audio_tower(replace(CONFIG, num_outputs=1), SAMPLE_RATE_HZ).load_state_dict(several.state_dict())


def test_eq_4_is_the_cosine_of_both_sides_flattened() -> None:
    towers = ModelConfig(audio=CONFIG, image=ImageTowerConfig(name="tiny-64"), text=TextTowerConfig(name="tiny-64"))
    torch.manual_seed(0)
    model = build_model(towers, "audio-image", SAMPLE_RATE_HZ).eval()
    frames_NLHWC = torch.randint(0, 256, (2, 4, 64, 64, 3), dtype=torch.uint8)
    with torch.no_grad():
        audio_NLD = model.audio(*waveforms(32400, 30000))
        audio_ND = model.embed_audio(*waveforms(32400, 30000))
        image_NLD = model.embed_images(frames_NLHWC)
    for row in range(2):
        for number in range(4):
            torch.testing.assert_close(image_NLD[row, number], model.embed_images(frames_NLHWC[row, number, None])[0])
    expected = [
        [nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0) for other in image_NLD]
        for one in audio_NLD
    ]
    torch.testing.assert_close(audio_ND @ model.joined(image_NLD).T, torch.tensor(expected))
    with_text = build_model(towers, "audio-text", SAMPLE_RATE_HZ).eval()
    with_text.audio.load_state_dict(model.audio.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(with_text.embed_audio(*waveforms(32400, 30000)), unit_length(audio_NLD.mean(dim=1)))


def test_segments_shorter_than_a_patch_are_refused() -> None:
    with pytest.raises(UserError, match="patch of 32 frames does not fit 7 segments of 200 frames"):
        create_audio_tower(replace(CONFIG, num_outputs=7), SAMPLE_RATE_HZ)
    create_audio_tower(replace(CONFIG, num_outputs=7, outputs="tokens"), SAMPLE_RATE_HZ)
