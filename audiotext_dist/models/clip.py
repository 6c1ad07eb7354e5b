"""open_clip models by name, with errors for people. Our own small configurations lie in ``configs/``.

open_clip, timm and transformers take seconds to import, so each is imported where a model is made: a recipe is read
and --help is told without them.
"""

from __future__ import annotations

import difflib
import functools
import textwrap
from pathlib import Path
from pickle import UnpicklingError  # what torch.load raises for a file that is not weights alone
from typing import Any

from safetensors import SafetensorError
from torch import nn

from audiotext_dist.errors import UserError

CONFIG_FOLDER = Path(__file__).with_name("configs")
# A download that fails, a file that is cut or of another kind, weights of another model.
WHAT_BROKEN_WEIGHTS_RAISE = (
    OSError,
    RuntimeError,
    UnpicklingError,
    SafetensorError,
    EOFError,
    LookupError,
    AttributeError,
)


def clip_settings(name: str) -> dict[str, Any]:
    """open_clip's configuration of this name: ``embed_dim``, ``vision_cfg``, ``text_cfg``, ...

    Raises:
        UserError: unknown name, or a captioning (CoCa) model.
    """
    import open_clip

    _register_own_configs()
    settings = open_clip.get_model_config(name) if name in open_clip.list_models() else None
    if settings is None:
        by_lower = {known.lower(): known for known in open_clip.list_models()}
        close = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
        mend = f"did you mean {' or '.join(by_lower[match] for match in close)}?" if close else "check the name"
        raise UserError(f"unknown open_clip model '{name}': {mend}")
    if "multimodal_cfg" in settings:
        raise UserError(f"open_clip model {name} is a captioning model: choose a plain CLIP such as ViT-B-32")
    return dict(settings)


def create_clip(name: str, pretrained: str | None) -> nn.Module:
    """An open_clip model with its towers at ``.visual`` and ``.text``, float32 on the CPU.

    Args:
        name: open_clip model name.
        pretrained: a tag of that model, or a local weights file (``.pt``, ``.safetensors``) of a whole
            open_clip model; None for random weights.

    Raises:
        UserError: unknown name, tag or file, weights that do not fit, or a download that fails.
    """
    import open_clip

    settings = clip_settings(name)
    if pretrained is not None:
        _check_pretrained(name, settings, pretrained)
    try:
        model = open_clip.create_model(name, pretrained, force_custom_text=True, pretrained_text=False)
    except WHAT_BROKEN_WEIGHTS_RAISE as error:
        if pretrained is not None and Path(pretrained).is_file():
            raise UserError(
                f"{pretrained} does not hold the weights of open_clip model {name}: give a .safetensors or .pt "
                "state dict of the whole model"
            ) from error
        reason = textwrap.shorten(str(error), 200)
        raise UserError(
            f"cannot load {pretrained or 'the parts'} of open_clip model {name} ({reason}): "
            "download it once where there is a network, or give a local weights file"
        ) from error
    assert isinstance(model, nn.Module)
    return model


def _check_pretrained(name: str, settings: dict[str, Any], pretrained: str) -> None:
    import open_clip

    if open_clip.is_pretrained_cfg(name, pretrained):
        tag_settings = open_clip.get_pretrained_cfg(name, pretrained)
        # open_clip only warns, and the tower is then silently a worse one.
        if tag_settings.get("quick_gelu") and not settings.get("quick_gelu"):
            raise UserError(
                f"the weights '{pretrained}' are of {name} with QuickGELU: set the name to {name}-quickgelu"
            )
    elif not Path(pretrained).is_file():
        if "/" in pretrained or Path(pretrained).suffix in (".pt", ".pth", ".bin", ".safetensors"):
            raise UserError(f"no weights file at {pretrained}: check the path")
        known = ", ".join(open_clip.list_pretrained_tags_by_model(name))
        mend = f"its tags are {known}" if known else "give a local weights file, or null for random weights"
        raise UserError(f"open_clip model {name} has no pretrained tag '{pretrained}': {mend}")


@functools.cache
def _register_own_configs() -> None:
    import open_clip

    open_clip.add_model_config(CONFIG_FOLDER)
