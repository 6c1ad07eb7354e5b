"""Which encoder made an embedding: what two encoders must share for the same clip to get the same vector."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from audiotext_dist.data.sets import DataConfig
from audiotext_dist.models.dual_encoder import DualEncoder, ModelConfig

Modality = Literal["audio", "image", "text"]
# Where a tower's weights came from; the digest of the weights says it better.
_ORIGIN_KEYS = {"pretrained", "sha256", "init", "init_from_image", "frozen"}
# Groups of settings in a tower's configuration, of which that of its own kind counts.
_KINDS = {"passt", "mobilenet", "atst", "transformers"}
# What only CLIP's audio tower reads; and the kinds that read no name.
_CLIP_ALONE = {"stride_frames", "stride_bins", "num_outputs", "outputs", "fbank"}
_NAMELESS = {"passt", "mobilenet", "atst"}


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """One tower of one model.

    model: its name, or its kind where that says all. weights_sha256: of every weight and buffer that is saved.
    preprocessing: all that happens between a clip's file and the tower, as plain JSON values.
    """

    model: str
    weights_sha256: str
    preprocessing: dict[str, Any]

    def difference(self, other: Encoder) -> str | None:
        """How this encoder differs from the other one, in words; None where they are the same."""
        if self.model != other.model:
            return f"by model {self.model}, not {other.model}"
        for key in sorted(self.preprocessing.keys() | other.preprocessing.keys()):
            own, others = self.preprocessing.get(key), other.preprocessing.get(key)
            if own != others:
                return f"with {key}={own}, not {others}"
        if self.weights_sha256 != other.weights_sha256:
            return f"by other weights of {self.model} ({self.weights_sha256[:12]}, not {other.weights_sha256[:12]})"
        return None


def encoder_of(model: DualEncoder, config: ModelConfig, data: DataConfig, modality: Modality) -> Encoder:
    """The identity of one tower of a model that was built from ``config``, with its weights as they are now."""
    tower = getattr(model, modality)
    assert isinstance(tower, nn.Module), f"the model has no {modality} tower"
    preparation: dict[str, Any] = {}
    if model.image is not None and modality == "image":
        transform = model.image.transform
        preparation = {"num_frames": data.num_frames, "pixels": transform.size}
        preparation |= {"mean": transform.mean_3.tolist(), "std": transform.std_3.tolist()}
    return _encoder(config, data, modality, tower.state_dict(), preparation)


def teacher_encoders(
    weights: Mapping[str, torch.Tensor], config: ModelConfig, data: DataConfig
) -> dict[Modality, Encoder]:
    """The identity of the audio and the text tower of a whole model's weights, without building it."""
    modalities: tuple[Modality, ...] = ("audio", "text")
    found = {}
    for modality in modalities:
        prefix = f"{modality}."
        state = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        found[modality] = _encoder(config, data, modality, state, {})
    return found


def _encoder(
    config: ModelConfig,
    data: DataConfig,
    modality: Modality,
    state: Mapping[str, torch.Tensor],
    preparation: dict[str, Any],
) -> Encoder:
    settings = asdict(getattr(config.without_weights(), modality))
    name, kind = settings.pop("name"), settings.get("kind", "clip")
    others = _ORIGIN_KEYS | (_KINDS - {kind}) | (set() if kind == "clip" else _CLIP_ALONE)
    preprocessing = {key: value for key, value in settings.items() if key not in others} | preparation
    if modality == "audio":
        preprocessing |= {"sample_rate_hz": data.sample_rate_hz, "clip_seconds": data.clip_seconds}
    # Of a text tower the tokenizer belongs to the model's name.
    return Encoder(
        model=kind if kind in _NAMELESS else name,
        weights_sha256=_sha256_of(state),
        # As it is read back: a tuple becomes a list.
        preprocessing=json.loads(json.dumps(preprocessing)),
    )


def _sha256_of(state: Mapping[str, torch.Tensor]) -> str:
    """Hex SHA-256 of the names, types, shapes and values of a module's state, wherever it lies."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        sha256.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        sha256.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()
