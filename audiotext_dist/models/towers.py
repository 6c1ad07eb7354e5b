"""Which towers a configuration names: the one place that knows all kinds of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from torch import nn

from audiotext_dist.errors import UserError
from audiotext_dist.models.atst import AtstTower
from audiotext_dist.models.audio import AudioTower, AudioTowerConfig, create_audio_tower
from audiotext_dist.models.hub_text import HubTextTower
from audiotext_dist.models.mobilenet import MobileNetTower
from audiotext_dist.models.passt import PasstTower
from audiotext_dist.models.text import TextTower, TextTowerConfig
from audiotext_dist.models.weights import Network, load_published

if TYPE_CHECKING:
    from audiotext_dist.models.hub_audio import HubAudioTower

AnyTextTower = TextTower | HubTextTower
AnyAudioTower: TypeAlias = "AudioTower | PasstTower | MobileNetTower | AtstTower | HubAudioTower"


def build_audio_tower(config: AudioTowerConfig, sample_rate_hz: int) -> AnyAudioTower:
    """The audio tower of ``config.kind``, on the CPU.

    All have the same interface: ``forward(waveform_NS, num_valid_samples_N, mask_uniforms_N4)`` gives [N, embed_dim].

    Raises:
        UserError: a model that is unknown or cannot be loaded, or settings that cannot be.
    """
    match config.kind:
        case "clip":
            return create_audio_tower(config, sample_rate_hz)
        case "passt":
            passt = PasstTower(config.passt, sample_rate_hz)
            _load_pretrained(passt.transformer, "passt", config)
            return passt
        case "mobilenet":
            mobilenet = MobileNetTower(config.mobilenet, sample_rate_hz)
            _load_pretrained(mobilenet.features, "mobilenet", config)
            return mobilenet
        case "atst":
            atst = AtstTower(config.atst, sample_rate_hz)
            _load_pretrained(atst.transformer, "atst", config)
            return atst
        case "transformers":
            from audiotext_dist.models.hub_audio import HubAudioTower

            return HubAudioTower(config.name, config.pretrained, sample_rate_hz)


def _load_pretrained(network: nn.Module, kind: Network, config: AudioTowerConfig) -> None:
    if config.pretrained is not None:
        load_published(network, kind, config.pretrained, config.sha256)


def build_text_tower(config: TextTowerConfig) -> AnyTextTower:
    """The text tower of ``config.kind``, on the CPU: ``tokenize`` gives what ``forward`` turns into [N, embed_dim].

    Raises:
        UserError: a model or tokenizer that is unknown or cannot be loaded.
    """
    match config.kind:
        case "clip":
            return TextTower(config)
        case "transformers":
            return HubTextTower(config.transformers, config.name, config.pretrained, frozen=config.frozen)


def heard_seconds(config: AudioTowerConfig) -> float:
    """The longest clip that an audio tower hears at once."""
    match config.kind:
        case "clip":
            fbank = config.fbank
            return fbank.num_fbank_frames * fbank.frame_shift_ms / 1000 + fbank.frame_length_ms / 1000
        case "passt":
            return config.passt.max_seconds
        case "mobilenet" | "transformers":  # the latter says itself where that is too much
            return float("inf")
        case "atst":
            return config.atst.max_seconds


def check_heard(config: AudioTowerConfig, clip_seconds: float) -> None:
    """Raise ``UserError`` where a clip, or a window of it, is longer than its tower hears."""
    heard, window = heard_seconds(config), config.window_seconds
    if window is not None and window > heard:
        raise UserError(f"model.audio.window_seconds={window:g} is more than the {heard:.3g} s that it hears: lower it")
    if window is None and clip_seconds > heard:
        mend = "raise model.audio.fbank.num_fbank_frames" if config.kind == "clip" else "set model.audio.window_seconds"
        raise UserError(
            f"data.clip_seconds={clip_seconds:g} is more than the {heard:.3g} s that the audio tower reads: "
            f"lower it, or {mend}"
        )
    if config.kind == "passt":
        seconds = clip_seconds if window is None else window
        columns = config.passt.num_columns(round(seconds * config.passt.sample_rate_hz))
        if columns <= config.passt.patchout_time:
            raise UserError(
                f"model.audio.passt.patchout_time={config.passt.patchout_time} leaves nothing of the {max(columns, 0)} "
                f"columns of {seconds:g} s: lower it"
            )
