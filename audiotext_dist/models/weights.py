"""Published weights of audio towers: where they lie, how they come here, and which of them a tower takes.

The authors give no checksums and none could be taken when this was written, so none stands here: ``sha256`` of a tower
checks a file against the digest that a person trusts, and each download's digest is logged.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from audiotext_dist import storage
from audiotext_dist.errors import UserError
from audiotext_dist.models.clip import WHAT_BROKEN_WEIGHTS_RAISE
from audiotext_dist.retry import RetryConfig

_log = logging.getLogger(__name__)
Network = Literal["passt", "mobilenet", "atst"]
_PASST = "https://github.com/kkoutini/PaSST/releases/download/"
_EFFICIENT_AT = "https://github.com/fschmid56/EfficientAT/releases/download/v0.0.1/"


class Published(NamedTuple):
    """url: of the file. page: where a person finds it, where it has no address that a program can read."""

    network: Network
    url: str | None
    page: str | None = None


PUBLISHED = {
    "passt_s_p16_s16_128_ap468": Published("passt", _PASST + "v0.0.2-audioset/passt-s-f128-p16-s16-ap.468.pt"),
    "passt_s_swa_p16_128_ap476": Published("passt", _PASST + "v0.0.1-audioset/passt-s-f128-p16-s10-ap.476-swa.pt"),
    "passt_s_kd_p16_128_ap486": Published("passt", _PASST + "v.0.0.9/passt-s-kd-ap.486.pt"),
    "mn04_as": Published("mobilenet", _EFFICIENT_AT + "mn04_as_mAP_432.pt"),
    "mn10_as": Published("mobilenet", _EFFICIENT_AT + "mn10_as_mAP_471.pt"),
    "mn40_as_ext": Published("mobilenet", _EFFICIENT_AT + "mn40_as_ext_mAP_487.pt"),
    "atstframe_base": Published("atst", None, "https://github.com/Audio-WestlakeU/audiossl"),
}
# What the published files hold beside the network.
_NOT_OURS = {
    "passt": ("head.", "head_dist."),
    "mobilenet": ("classifier.",),
    "atst": ("cls_token", "mask_embed"),
}
# A checkpoint of the authors' training; the last is that of a fine-tuned model.
_ATST_PREFIXES = ("model.teacher.encoder.", "encoder.encoder.frame_encoder.", "encoder.encoder.")


def load_published(network: nn.Module, kind: Network, pretrained: str, sha256: str | None) -> None:
    """Fill a network with published weights, or a copy of them.

    Args:
        pretrained: a name of ``PUBLISHED``, a URL or a local file (``.pt``, ``.ckpt``, ``.safetensors``).
        sha256: what the file must be; None takes any.

    Raises:
        UserError: unknown name, a file that cannot be had, is another than ``sha256``, or does not fit.
    """
    file = _local_file(pretrained, kind, sha256)
    if sha256 is not None and storage.sha256_of(file) != sha256.lower():
        raise UserError(
            f"{file} has not the SHA-256 {sha256}: remove it to fetch it again, or correct model.audio.sha256"
        )
    weights = _network_weights(_read(file), kind)
    own = network.state_dict()
    missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    other_shapes = [key for key in own.keys() & weights.keys() if own[key].shape != weights[key].shape]
    if missing or unknown or other_shapes:
        key = (other_shapes or missing or unknown)[0]
        raise UserError(
            f"{file} is no {kind} of the size that model.audio.{kind} says ({len(missing)} parameters missing, "
            f"{len(unknown)} unknown, {len(other_shapes)} of other shapes, {key} for one): set its sizes"
        )
    network.load_state_dict(weights)


def _local_file(pretrained: str, kind: Network, sha256: str | None) -> Path:
    if (published := PUBLISHED.get(pretrained)) is not None:
        if published.network != kind:
            raise UserError(f"the weights {pretrained} are of model.audio.kind={published.network}, not {kind}: set it")
        if published.url is None:
            raise UserError(
                f"{pretrained} must be fetched by hand, from {published.page}: give the file's path instead"
            )
        return _fetched(published.url)
    if storage.is_remote(pretrained):
        return _fetched(pretrained)
    if not Path(pretrained).is_file():
        known = ", ".join(name for name, each in PUBLISHED.items() if each.network == kind)
        raise UserError(f"model.audio.pretrained={pretrained} is no file: give one, a URL, or one of {known}")
    return Path(pretrained)


def _fetched(url: str) -> Path:
    """The file in torch.hub's folder, where the authors' own code puts it too; fetched once a node."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(url).path).name
    with storage.claimed(str(file), wait=True):
        if not file.is_file():
            try:
                with storage.atomic_local_file(file) as temporary, temporary.open("wb") as target:
                    for _, block in storage.blocks(url, 0, RetryConfig()):
                        target.write(block)
            except (FileNotFoundError, UserError) as error:
                raise UserError(
                    f"cannot fetch {storage.public_name(url)} ({error}): put it at {file} from where there is a "
                    "network, or give a local file"
                ) from None
            _log.warning("fetched %s, of SHA-256 %s", file, storage.sha256_of(file))
    return file


def _read(file: Path) -> dict[str, object]:
    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file))
        found = torch.load(file, map_location="cpu", weights_only=True)
    except WHAT_BROKEN_WEIGHTS_RAISE:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{file} holds no weights, or more than weights: save its state dict alone")
    return found


def _network_weights(found: dict[str, object], kind: Network) -> dict[str, Tensor]:
    """The network's own parameters under their own names."""
    nested = next((found[key] for key in ("state_dict", "model") if isinstance(found.get(key), dict)), found)
    assert isinstance(nested, dict)
    weights = {str(key): value for key, value in nested.items() if isinstance(value, Tensor)}
    if kind == "atst":
        prefix = next((each for each in _ATST_PREFIXES if any(key.startswith(each) for key in weights)), "")
        weights = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        weights = {f"norm_frame.{key[5:]}" if key.startswith("norm.") else key: weights[key] for key in weights}
    if kind == "mobilenet":
        weights = {key.removeprefix("features."): weights[key] for key in weights if key.startswith("features.")}
    return {key: weights[key] for key in weights if not key.startswith(_NOT_OURS[kind])}
