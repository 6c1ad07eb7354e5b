"""Two towers and a temperature: the one model of every recipe. The task says which two.

Shapes: N rows of a batch, D embedding, S samples, L frames, H and W picture, C context length.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal, Self

import torch
from torch import Tensor, nn

from audiotext_dist.errors import UserError, require_positive
from audiotext_dist.models.audio import AudioTower, AudioTowerConfig
from audiotext_dist.models.image import ImageTower, ImageTowerConfig
from audiotext_dist.models.text import TextTowerConfig
from audiotext_dist.models.towers import AnyAudioTower, AnyTextTower, build_audio_tower, build_text_tower
from audiotext_dist.models.windows import Windows

Task = Literal["audio-image", "audio-text", "image-text"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Towers and temperature; a task builds only the two towers it names.

    init: a run folder, checkpoint or export of these very towers, from which the whole model starts; its temperature
    too, unless learn_temperature=false, where init_temperature holds. projection_dim: of one trained linear layer after
    each tower, also after a frozen one; null keeps what the towers say, which then must have the same dimensions.
    init_temperature: of the softmax; CLIP's 0.07. max_logit_scale: upper bound of 1 / temperature.
    init_logit_bias: of loss.name=sigmoid, which starts well from -10 with init_temperature=0.1; null for softmax.
    """

    audio: AudioTowerConfig = field(default_factory=AudioTowerConfig)
    image: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    init: str | None = None
    projection_dim: int | None = None
    init_temperature: float = 0.07
    learn_temperature: bool = True
    max_logit_scale: float = 100.0
    init_logit_bias: float | None = None

    def without_weights(self) -> ModelConfig:
        """The same towers, to be filled from a checkpoint: nothing is read or downloaded to build them."""
        audio = dataclasses.replace(self.audio, pretrained=None, sha256=None, init=None, init_from_image=False)
        if self.audio.init_from_image:
            audio = dataclasses.replace(audio, name=self.image.name)
        return dataclasses.replace(
            self,
            init=None,
            audio=audio,
            image=dataclasses.replace(self.image, pretrained=None, init=None),
            text=dataclasses.replace(self.text, pretrained=None, init=None),
        )

    def __post_init__(self) -> None:
        require_positive(self, "model", "init_temperature", "max_logit_scale", "projection_dim")
        for modality in ("audio", "image", "text"):
            if self.init is not None and getattr(self, modality).init is not None:
                raise UserError(f"model.init and model.{modality}.init exclude each other: leave one of them out")
        if 1 / self.max_logit_scale > self.init_temperature:
            raise UserError(
                f"model.init_temperature={self.init_temperature} is below 1 / model.max_logit_scale="
                f"{1 / self.max_logit_scale:g}: raise one of them"
            )


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """A batch as the towers read it; None where the task does not need it.

    waveform_NS: int16, or float in [-1, 1]. mask_uniforms_N4: see ``Fbank.forward``; None at evaluation.
    frames_NHWC: uint8 RGB, or [N, L, H, W, 3] where every frame counts. tokens_NC: from ``TextTower.tokenize``.
    image_embeddings_ND (or [N, L, D]), text_embeddings_ND: what a frozen tower said already, which is not asked again.
    """

    waveform_NS: Tensor | None = None
    num_valid_samples_N: Tensor | None = None
    mask_uniforms_N4: Tensor | None = None
    frames_NHWC: Tensor | None = None
    tokens_NC: Tensor | None = None
    image_embeddings_ND: Tensor | None = None
    text_embeddings_ND: Tensor | None = None


class DualEncoder(nn.Module):
    """Two of the three towers into one space.

    logit_scale: the log of the scale of the cosines, shape (1,), since DeepSpeed takes no 0-dim parameter.
    logit_bias: what the sigmoid loss adds to the scaled cosines, shape (1,), or None.
    autocast_dtype: what the towers compute in; None leaves that to the caller.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        audio: AnyAudioTower | None,
        image: ImageTower | None,
        text: AnyTextTower | None,
        windows: Windows | None = None,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.audio = audio
        self.image = image
        self.text = text
        self.windows = windows
        self.is_audio_frozen = config.audio.frozen
        self.autocast_dtype = autocast_dtype
        self.max_log_scale = math.log(config.max_logit_scale)
        self.logit_scale = nn.Parameter(
            torch.full((1,), -math.log(config.init_temperature)), requires_grad=config.learn_temperature
        )
        bias = config.init_logit_bias
        self.logit_bias = None if bias is None else nn.Parameter(torch.full((1,), bias))
        if audio is not None and self.is_audio_frozen:
            audio.requires_grad_(False)
        self.embed_dim = config.projection_dim or next(tower.embed_dim for tower in (audio, image, text) if tower)
        for tower in (audio, image, text):
            if tower is not None:
                # Inside its tower, with which it is loaded, saved and given a rate of its own.
                dim = config.projection_dim
                tower.projection = nn.Identity() if dim is None else nn.Linear(tower.embed_dim, dim)
        self.train()

    def train(self, mode: bool = True) -> Self:
        """Training mode, but for what is frozen."""
        super().train(mode)
        if self.is_audio_frozen and self.audio is not None:
            self.audio.eval()
        return self

    def forward(self, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        """The task's two sides in the order of its name, each float32 [N, D] of unit length.

        Where every frame was given, the image side is [N, L, D], or both sides [N, L * D] under Multiframe Match.
        """
        sides = []
        if self.audio is not None:
            assert inputs.waveform_NS is not None
            assert inputs.num_valid_samples_N is not None
            sides.append(self.embed_audio(inputs.waveform_NS, inputs.num_valid_samples_N, inputs.mask_uniforms_N4))
        if inputs.image_embeddings_ND is not None:
            sides.append(self.joined(unit_length(inputs.image_embeddings_ND)))
        elif self.image is not None:
            assert inputs.frames_NHWC is not None
            sides.append(self.joined(self.embed_images(inputs.frames_NHWC)))
        if inputs.text_embeddings_ND is not None:
            sides.append(unit_length(inputs.text_embeddings_ND))
        elif self.text is not None:
            assert inputs.tokens_NC is not None
            sides.append(self.embed_text(inputs.tokens_NC))
        first_ND, second_ND = sides
        return first_ND, second_ND

    def embed_audio(
        self, waveform_NS: Tensor, num_valid_samples_N: Tensor, mask_uniforms_N4: Tensor | None = None
    ) -> Tensor:
        """As ``Fbank.forward``; float32 [N, D] of unit length.

        The outputs of a tower with several are one vector [N, L * D] beside an image tower, else their mean.
        """
        assert self.audio is not None
        if self.is_audio_frozen:
            mask_uniforms_N4 = None  # it says the same of a clip always
        with self._precision(waveform_NS.device):
            if self.windows is None:
                embedding_ND = self.audio(waveform_NS, num_valid_samples_N, mask_uniforms_N4)
            else:
                embedding_ND = self.windows.mean(self.audio, waveform_NS, num_valid_samples_N, mask_uniforms_N4)
            embedding_ND = _projected(self.audio, embedding_ND)
        if embedding_ND.ndim == 3 and not self.matches_all_frames:
            embedding_ND = embedding_ND.float().mean(dim=1)
        return unit_length(embedding_ND.flatten(1))

    def embed_images(self, frames_NHWC: Tensor) -> Tensor:
        """uint8 RGB [N, H, W, 3] -> float32 [N, D] of unit length; [N, L, H, W, 3] -> [N, L, D]."""
        assert self.image is not None
        with self._precision(frames_NHWC.device):
            embedding_ND = _projected(self.image, self.image(frames_NHWC.flatten(0, -4)))
        return unit_length(embedding_ND.view(*frames_NHWC.shape[:-3], -1))

    @property
    def matches_all_frames(self) -> bool:
        """True under Multiframe Match (Temporal agreement, Eq. 4)."""
        return self.image is not None and isinstance(self.audio, AudioTower) and self.audio.num_outputs > 1

    def joined(self, frames_NLD: Tensor) -> Tensor:
        """All frames as one unit vector [N, L * D] under Multiframe Match, whose cosine is Eq. 4; else as they are.

        Each frame has length 1 before, as feature files hold it: CLIP's own lengths hardly differ.
        """
        if not self.matches_all_frames or frames_NLD.ndim == 2:
            return frames_NLD
        return unit_length(frames_NLD.flatten(1))

    def embed_text(self, tokens_NC: Tensor) -> Tensor:
        """int64 [N, C] from ``TextTower.tokenize`` -> float32 [N, D] of unit length."""
        assert self.text is not None
        with self._precision(tokens_NC.device):
            embedding_ND = _projected(self.text, self.text(tokens_NC))
        return unit_length(embedding_ND)

    @property
    def frame_pixels(self) -> int:
        """Side of the square pictures that the image tower reads; 0 without one."""
        return 0 if self.image is None else self.image.transform.size

    def scale(self) -> Tensor:
        """1 / temperature, at most ``max_logit_scale``; shape (1,).

        The bound is on the value alone: a clamped gradient would hold the scale at its bound for good. The training
        brings the parameter itself down after every update, so it does not run away meanwhile.
        """
        excess = (self.logit_scale - self.max_log_scale).clamp(min=0.0).detach()
        return (self.logit_scale - excess).exp()

    def _precision(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.autocast_dtype)


def build_model(
    config: ModelConfig, task: Task, sample_rate_hz: int, autocast_dtype: torch.dtype | None = None
) -> DualEncoder:
    """The two towers of the task, on the CPU, pretrained where the configuration says so.

    Raises:
        UserError: a tower that cannot be made, towers of different embedding sizes, or
            ``audio.init_from_image`` in a task without an image tower.
    """
    modalities = task.split("-")
    image = ImageTower(config.image) if "image" in modalities else None
    text = build_text_tower(config.text) if "text" in modalities else None
    audio: AnyAudioTower | None = None
    if "audio" in modalities:
        if config.audio.init_from_image:
            if image is None:
                raise UserError(
                    f"task={task} has no image tower for model.audio.init_from_image=true: "
                    "set model.audio.name and model.audio.pretrained instead"
                )
            audio = AudioTower(config.audio, sample_rate_hz, image.visual)
        else:
            audio = build_audio_tower(config.audio, sample_rate_hz)
    dims = [f"{tower.embed_dim}" for tower in (audio, image, text) if tower is not None]
    if dims[0] != dims[1] and config.projection_dim is None:
        raise UserError(
            f"the {modalities[0]} tower gives {dims[0]} dimensions and the {modalities[1]} tower {dims[1]}: "
            "choose two models of one size, or set model.projection_dim"
        )
    windows = config.audio.windows(sample_rate_hz)
    return DualEncoder(config, audio=audio, image=image, text=text, windows=windows, autocast_dtype=autocast_dtype)


def _projected(tower: nn.Module, embedding_ND: Tensor) -> Tensor:
    projection = tower.projection
    assert isinstance(projection, nn.Module)
    projected_ND: Tensor = projection(embedding_ND)
    return projected_ND


def unit_length(embedding_ND: Tensor) -> Tensor:
    """float32, each row of length 1."""
    return nn.functional.normalize(embedding_ND.float(), dim=-1)
