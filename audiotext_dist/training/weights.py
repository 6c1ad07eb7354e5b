"""The weights of a run, of one of its checkpoints or of an export, read without DeepSpeed.

Wherever weights are asked for, run_dir means its newest checkpoint and run_dir/checkpoints/best its best one.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from audiotext_dist.errors import UserError
from audiotext_dist.training.checkpoint_folder import weights_folder

MODEL_FILE = "model.safetensors"
EMA_FILE = "ema.safetensors"


def load_model(model: nn.Module, source: str, *, ema: bool = True) -> None:
    """Load every weight of a model from where ``read_weights`` finds them.

    Raises:
        UserError: nothing there, or weights of another model.
    """
    load_strictly(model, read_weights(source, ema=ema), f"the weights at {source}")


def load_tower(tower: nn.Module, modality: str, source: str) -> None:
    """Load one tower (``audio``, ``image`` or ``text``) from the weights of another run.

    Raises:
        UserError: nothing there, or a run without such a tower.
    """
    prefix = f"{modality}."
    weights = {key.removeprefix(prefix): value for key, value in read_weights(source).items() if key.startswith(prefix)}
    if not weights:
        raise UserError(f"{source} has no {modality} tower: point model.{modality}.init at a run that trained one")
    load_strictly(tower, weights, f"the {modality} tower of {source}")


def read_weights(source: str, *, ema: bool = True) -> dict[str, torch.Tensor]:
    """Weights from what ``weights_folder`` takes, averaged where it holds averages and ``ema``; or a .safetensors file.

    Raises:
        UserError: nothing of the kind there.
    """
    folder = weights_folder(Path(source))
    path = folder / MODEL_FILE if folder.is_dir() else folder
    if not path.is_file():
        raise UserError(f"no weights at {source}: give a run folder, a checkpoint folder or a .safetensors file")
    averages = folder / EMA_FILE
    try:
        return load_file(path) | (load_file(averages) if ema and averages.is_file() else {})
    except SafetensorError as error:
        raise UserError(f"{path} is no safetensors file ({error}): export it again") from None


def make_readable(weights_file: Path) -> None:
    """Let the group read a weights file as it reads all others: safetensors writes for its owner alone."""
    weights_file.chmod(0o644)


def load_strictly(module: nn.Module, weights: dict[str, torch.Tensor], what: str) -> None:
    """Every weight of a module and no other; ``what`` names them in the error."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{what} is of another model than this recipe's: set the same names and sizes ({reason})"
        ) from None
