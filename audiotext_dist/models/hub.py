"""Models of the transformers library, by a name on the Hugging Face hub or a local folder, with errors for people."""

from __future__ import annotations

import contextlib
import logging
import os
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from audiotext_dist.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# The library's names for the same two things: dropout of hidden states, dropout of attention.
_DROPOUT_KEYS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout")


@contextlib.contextmanager
def hub_errors(key: str, name: str) -> Iterator[None]:
    """Tell what cannot be loaded in one line that names the recipe's key and the mend."""
    # Workers are forked after the first caption; the tokenizers' own threads would not live through that.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise UserError(
            f"cannot load {key}={name} ({textwrap.shorten(str(error), 200)}): give the name of a model on the hub, "
            "downloaded once where there is a network (hf download NAME), or a local folder"
        ) from None


def hub_config(key: str, name: str, dropout: float | None) -> PreTrainedConfig:
    """A model's configuration, with this dropout wherever it has one; None leaves it as it is.

    Raises:
        UserError: it cannot be loaded.
    """
    from transformers import AutoConfig

    with hub_errors(key, name):
        config: PreTrainedConfig = AutoConfig.from_pretrained(name)
    for each in _DROPOUT_KEYS:
        if dropout is not None and hasattr(config, each):
            setattr(config, each, dropout)
    return config


def hub_model(key: str, auto: Any, config: PreTrainedConfig, pretrained: str | None) -> PreTrainedModel:
    """The model of this configuration, float32, with random weights or those of ``pretrained``.

    Args:
        auto: the library's class that makes it.

    Raises:
        UserError: the weights cannot be loaded, or lack some of the model's.
    """
    from transformers import PreTrainedModel

    if pretrained is None:
        # A published configuration may say float16, which is how its weights are stored.
        made = auto.from_config(config, dtype=torch.float32) if hasattr(auto, "from_config") else auto(config)
        assert isinstance(made, PreTrainedModel)
        return _without_pooler(made)
    with hub_errors(key, pretrained):
        made, report = auto.from_pretrained(pretrained, config=config, dtype=torch.float32, output_loading_info=True)
    assert isinstance(made, PreTrainedModel)
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise UserError(
            f"{key}={pretrained} lacks {len(missing)} weights of the model, {missing[0]} for one: give others"
        )
    return _without_pooler(made)


def _without_pooler(model: PreTrainedModel) -> PreTrainedModel:
    """Without the layer after the first token, which serves BERT's own training and would get no gradient."""
    if isinstance(getattr(model, "pooler", None), nn.Module):
        model.register_module("pooler", None)
    return model


def compute_activations_again(model: PreTrainedModel) -> None:
    """Not keep the activations for the backward.

    Raises:
        UserError: the model does not know how.
    """
    try:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]
    except ValueError:
        name = type(model).__name__
        raise UserError(
            f"{name} cannot compute its activations again: set engine.activation_checkpointing=false"
        ) from None
