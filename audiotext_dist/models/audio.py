"""The audio tower: CLIP's own vision transformer, made to read FBANK (VIP-ANT, Zhao et al. 2022).

    waveform -> FBANK [N, 1, time, mel] -> overlapping patches -> CLIP's transformer -> embedding

Two parts change, and both start from the image weights: the patch convolution (three channels to one, a
finer stride) and the grid of positional embeddings (7x7 to 61x5 for ViT-B/32).

For Multiframe Match the tower gives several embeddings a clip, one for each part of its sound in time. Its
parameters are the same ones, so a tower that was trained either way loads into the other.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from audiotext_dist.errors import UserError, require_positive
from audiotext_dist.models.atst import AtstConfig
from audiotext_dist.models.clip import create_clip
from audiotext_dist.models.frontends import Fbank, FbankConfig
from audiotext_dist.models.mobilenet import MobileNetConfig
from audiotext_dist.models.passt import PasstConfig
from audiotext_dist.models.windows import Windows

if TYPE_CHECKING:
    from open_clip.transformer import VisionTransformer

Kind = Literal["clip", "passt", "mobilenet", "atst", "transformers"]


@dataclass(frozen=True, kw_only=True)
class AudioTowerConfig:
    """The audio tower: CLIP's vision transformer over FBANK, or one of the other kinds, each with a group of its own.

    pretrained: for clip a tag of its model or a local weights file, for passt, mobilenet and atst a published name
    (passt_s_p16_s16_128_ap468, mn10_as), a file or a URL, for transformers what name is, mostly the same; null is
    random. sha256: what that file must be, of passt, mobilenet and atst. init: a run folder or export whose own tower
    of this kind is loaded over that. frozen: no gradient, evaluation mode always. window_seconds, window_hop_seconds: a
    longer clip is the mean over such windows, of those that hold sound; null for none, and for windows without overlap.
    name: of clip an open_clip model; of transformers one on the hub or a local folder (AST, CLAP, wav2vec 2.0), for
    sizes and feature extractor. Of clip alone: init_from_image: copy the model's image tower instead of reading
    ``name`` and ``pretrained``. stride_frames, stride_bins: of the patches, in FBANK frames and mel bins; the patch
    itself has the size of the CLIP model's. num_outputs, outputs: embeddings a clip, each of a segment of it heard
    alone, or of its tokens.
    """

    kind: Kind = "clip"
    name: str = "ViT-B-32"
    pretrained: str | None = None
    sha256: str | None = None
    init: str | None = None
    init_from_image: bool = False
    frozen: bool = False
    window_seconds: float | None = None
    window_hop_seconds: float | None = None
    stride_frames: int = 16
    stride_bins: int = 24
    num_outputs: int = 1
    outputs: Literal["segments", "tokens"] = "segments"
    fbank: FbankConfig = field(default_factory=FbankConfig)
    passt: PasstConfig = field(default_factory=PasstConfig)
    mobilenet: MobileNetConfig = field(default_factory=MobileNetConfig)
    atst: AtstConfig = field(default_factory=AtstConfig)

    def __post_init__(self) -> None:
        require_positive(self, "model.audio", "num_outputs", "window_seconds", "window_hop_seconds")
        if self.window_hop_seconds is not None and self.window_hop_seconds > (self.window_seconds or 0):
            raise UserError(
                f"model.audio.window_hop_seconds={self.window_hop_seconds:g} is more than model.audio.window_seconds="
                f"{self.window_seconds}, which would leave sound unheard: lower it"
            )
        if self.kind != "clip" and (self.init_from_image or self.num_outputs > 1):
            raise UserError(
                f"model.audio.kind={self.kind} has no init_from_image and one output: set kind=clip, or leave them out"
            )
        if self.sha256 is not None and self.kind in ("clip", "transformers"):
            raise UserError(f"model.audio.sha256 says nothing to kind={self.kind}: set it to null")
        if self.window_seconds is not None and self.num_outputs > 1:
            raise UserError("model.audio.num_outputs are of a whole clip: set model.audio.window_seconds=null")

    def windows(self, sample_rate_hz: int) -> Windows | None:
        """The windows that a clip is heard in, or None for all of it at once."""
        if self.window_seconds is None:
            return None
        sizes = [seconds * sample_rate_hz for seconds in (self.window_seconds, self.window_hop_seconds) if seconds]
        return Windows(window_samples=max(1, round(sizes[0])), hop_samples=max(1, round(sizes[-1])))


class ChannelMeanConv(nn.Module):
    """A three-channel patch convolution read on one channel.

    The three-channel weights stay the parameter, so image checkpoints fit and each channel keeps its own
    gradient; the input meets their channel mean.
    """

    def __init__(self, conv: nn.Conv2d, stride: tuple[int, int]) -> None:
        super().__init__()
        assert conv.bias is None
        self.weight = conv.weight
        self.stride = stride

    def forward(self, fbank_N1TF: Tensor) -> Tensor:
        """[N, 1, time, mel] -> [N, width, grid time, grid mel]."""
        return nn.functional.conv2d(fbank_N1TF, self.weight.mean(dim=1, keepdim=True), stride=self.stride)


class AudioTower(nn.Module):
    """Waveforms to embeddings, not normalised."""

    def __init__(self, config: AudioTowerConfig, sample_rate_hz: int, visual: nn.Module) -> None:
        """``visual``: an open_clip image tower to start from; it is copied."""
        super().__init__()
        self.config = config
        self.num_outputs = config.num_outputs
        self.fbank = Fbank(config.fbank, sample_rate_hz)
        self.transformer = audio_transformer_from(visual, config)
        self.embed_dim: int = self.transformer.output_dim

    def forward(
        self, waveform_NS: Tensor, num_valid_samples_N: Tensor, mask_uniforms_N4: Tensor | None = None
    ) -> Tensor:
        """As ``Fbank.forward``; returns [N, embed_dim], or [N, num_outputs, embed_dim] where these are several."""
        fbank_N1TF = self.fbank(waveform_NS, num_valid_samples_N, mask_uniforms_N4)
        if self.num_outputs == 1:
            embedding_ND: Tensor = self.transformer(fbank_N1TF)
            return embedding_ND
        num_valid_frames_N = self.fbank.is_valid_frame(num_valid_samples_N).sum(dim=1)
        match self.config.outputs:
            case "segments":
                return self._encode_segments(fbank_N1TF, num_valid_frames_N)
            case "tokens":
                return self._pool_tokens(fbank_N1TF, num_valid_frames_N)

    def _encode_segments(self, fbank_N1TF: Tensor, num_valid_frames_N: Tensor) -> Tensor:
        """Each segment as a clip of its own, whose positions are the whole clip's, resized; [N, L, D]."""
        segments_MTF = cut_segments(fbank_N1TF[:, 0], num_valid_frames_N, self.num_outputs).flatten(0, 1)
        transformer = self.transformer
        grid = _patch_grid(segments_MTF.shape[1], segments_MTF.shape[2], transformer.patch_size, self.config)
        # Antialiased: else the gradient would reach only some rows of the grid.
        positions = resize_position_grid(transformer.positional_embedding, transformer.grid_size, grid, antialias=True)
        embedding_MD: Tensor = functional_call(
            transformer, {"positional_embedding": positions}, (segments_MTF.unsqueeze(1),)
        )
        return embedding_MD.reshape(len(fbank_N1TF), self.num_outputs, -1)

    def _pool_tokens(self, fbank_N1TF: Tensor, num_valid_frames_N: Tensor) -> Tensor:
        """The mean of the patch tokens of each part, normalised and projected as the CLS token is; [N, L, D]."""
        transformer, (grid_frames, grid_bins) = self.transformer, self.transformer.grid_size
        tokens_NPC = transformer.transformer(transformer._embeds(fbank_N1TF))[:, 1:]
        tokens_NGC = tokens_NPC.unflatten(1, (grid_frames, grid_bins)).mean(dim=2)
        patch_frames = transformer.patch_size[0]
        num_valid_N = 1 + (num_valid_frames_N - patch_frames).clamp(min=0) // self.config.stride_frames
        share_NLG = part_shares(num_valid_N, self.num_outputs, grid_frames)
        embedding_NLD: Tensor = transformer.ln_post(share_NLG.to(tokens_NGC.dtype) @ tokens_NGC) @ transformer.proj
        return embedding_NLD


def cut_segments(fbank_NTF: Tensor, num_valid_N: Tensor, num_segments: int) -> Tensor:
    """Equal parts of each clip's sound, [N, num_segments, ceil(T / num_segments), F]; 0 after a part's end.

    The frames of a clip are spread over its sound, so its padding belongs to no part.
    """
    length = math.ceil(fbank_NTF.shape[1] / num_segments)
    edge = torch.arange(num_segments + 1, device=num_valid_N.device)
    edges_NL = num_valid_N[:, None] * edge // num_segments
    place_T = torch.arange(length, device=num_valid_N.device)
    index_NLT = edges_NL[:, :-1, None] + place_T
    blank_NLT = index_NLT >= edges_NL[:, 1:, None]
    row_N11 = torch.arange(len(fbank_NTF), device=num_valid_N.device)[:, None, None]
    segments_NLTF = fbank_NTF[row_N11, index_NLT.clamp(max=fbank_NTF.shape[1] - 1)]
    return segments_NLTF.masked_fill(blank_NLT[..., None], 0.0)


def part_shares(num_valid_N: Tensor, num_parts: int, num_places: int) -> Tensor:
    """What each place in time counts in the mean of each part, [N, num_parts, num_places], rows of sum 1.

    Parts share the first ``num_valid_N`` places as evenly as whole places allow, and none is empty.
    """
    part_L = torch.arange(num_parts, device=num_valid_N.device)
    first_NL = num_valid_N[:, None] * part_L // num_parts
    end_NL = -(-num_valid_N[:, None] * (part_L + 1) // num_parts)
    place_G = torch.arange(num_places, device=num_valid_N.device)
    is_in_NLG = (place_G >= first_NL[..., None]) & (place_G < end_NL[..., None])
    return is_in_NLG / is_in_NLG.sum(dim=-1, keepdim=True)


def create_audio_tower(config: AudioTowerConfig, sample_rate_hz: int) -> AudioTower:
    """An audio tower from the open_clip model that ``config`` names.

    Raises:
        UserError: see ``create_clip`` and ``audio_transformer_from``.
    """
    visual = create_clip(config.name, config.pretrained).visual
    assert isinstance(visual, nn.Module)
    return AudioTower(config, sample_rate_hz, visual)


def audio_transformer_from(visual: nn.Module, config: AudioTowerConfig) -> VisionTransformer:
    """A trainable copy of an open_clip vision transformer that reads [N, 1, time, mel].

    Raises:
        UserError: the tower is no plain vision transformer, or its patch is larger than the FBANK.
    """
    from open_clip.transformer import VisionTransformer

    if not isinstance(visual, VisionTransformer):
        raise UserError(
            f"the audio tower needs a CLIP vision transformer, not a {type(visual).__name__}: "
            "choose a model such as ViT-B-32"
        )
    num_frames, num_bins = config.fbank.num_fbank_frames, config.fbank.num_mel_bins
    patch_frames, patch_bins = visual.patch_size
    if patch_frames > num_frames or patch_bins > num_bins:
        raise UserError(
            f"a patch of {patch_frames}x{patch_bins} does not fit an FBANK of {num_frames}x{num_bins}: "
            "raise fbank.num_fbank_frames or fbank.num_mel_bins, or choose a model with smaller patches"
        )
    if config.outputs == "segments" and patch_frames * config.num_outputs > num_frames:
        raise UserError(
            f"a patch of {patch_frames} frames does not fit {config.num_outputs} segments of {num_frames} frames: "
            "raise fbank.num_fbank_frames, lower num_outputs, or set outputs=tokens"
        )
    if config.stride_frames < 1 or config.stride_bins < 1:
        raise UserError(f"patch stride {config.stride_frames}x{config.stride_bins}: give values above 0")
    grid = _patch_grid(num_frames, num_bins, visual.patch_size, config)
    transformer = copy.deepcopy(visual).train().requires_grad_(True)
    positional_embedding = resize_position_grid(transformer.positional_embedding.detach(), visual.grid_size, grid)
    transformer.positional_embedding = nn.Parameter(positional_embedding)
    transformer.conv1 = ChannelMeanConv(transformer.conv1, (config.stride_frames, config.stride_bins))
    transformer.image_size, transformer.grid_size = (num_frames, num_bins), grid
    return transformer


def _patch_grid(
    num_frames: int, num_bins: int, patch_size: tuple[int, int], config: AudioTowerConfig
) -> tuple[int, int]:
    """Patches in time and in frequency."""
    return (
        (num_frames - patch_size[0]) // config.stride_frames + 1,
        (num_bins - patch_size[1]) // config.stride_bins + 1,
    )


def resize_position_grid(
    positional_embedding: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], *, antialias: bool = False
) -> Tensor:
    """Bilinear resize of a positional grid, without aligned corners; the CLS row is kept.

    Args:
        positional_embedding: [1 + old height * old width, C], CLS first, rows of the grid after it.
        old_grid: (height, width).
        new_grid: (height, width).

    Returns:
        [1 + new height * new width, C].
    """
    assert positional_embedding.shape[0] == 1 + math.prod(old_grid)
    cls_1C, grid_PC = positional_embedding[:1], positional_embedding[1:]
    grid_1CHW = grid_PC.T.reshape(1, -1, *old_grid)
    grid_1CHW = nn.functional.interpolate(
        grid_1CHW, new_grid, mode="bilinear", align_corners=False, antialias=antialias
    )
    return torch.cat([cls_1C, grid_1CHW.flatten(2)[0].T])
