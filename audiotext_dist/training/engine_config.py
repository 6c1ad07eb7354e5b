"""How a recipe asks for DeepSpeed, and what DeepSpeed is told."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from audiotext_dist.errors import UserError, require_positive


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How DeepSpeed shares the optimizer: ZeRO stage 0 (every rank holds all of it), 1 (a part each), or 2 (and
    a part of the gradients each).

    collective_timeout_seconds: a rank that gives no sign of life for so long, and a collective that takes longer, end
    the run on all ranks.
    deepspeed_config: a JSON file with more of DeepSpeed's own options; a key that says otherwise than the recipe is
    refused.
    compile: the towers, with torch.compile; the first steps and the first evaluation then take minutes.
    activation_checkpointing: compute the trained towers' activations again in the backward, to save their memory;
    transformers alone can.
    """

    zero_stage: int = 0
    deepspeed_config: str | None = None
    activation_checkpointing: bool = False
    compile: bool = False
    collective_timeout_seconds: float = 600.0

    def __post_init__(self) -> None:
        require_positive(self, "engine", "collective_timeout_seconds")
        if self.zero_stage == 3:
            raise UserError(
                "engine.zero_stage=3 is not supported, since it cuts the weights themselves apart, which checkpoints "
                "and evaluation need whole: choose 2"
            )
        if self.zero_stage not in (0, 1, 2):
            raise UserError(f"engine.zero_stage={self.zero_stage} is not supported: choose 0, 1 or 2")


# DeepSpeed's keys for what the recipe decides in its own way.
_DECIDED_BY = {
    "optimizer": "optim.name",
    "scheduler": "optim.warmup_epochs and optim.final_lr_share",
    "fp16": "training.precision",
    "bf16": "training.precision",
    "bfloat16": "training.precision",
    "torch_autocast": "training.precision",
    "amp": "training.precision",
    "data_types": "training.precision",
    "activation_checkpointing": "engine.activation_checkpointing",
    "gradient_clipping": "optim.gradient_clipping",
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.micro_batch_size",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_allow_untested_optimizer": "it to true, since DeepSpeed knows none of these optimizers",
}
_WHOLE = "since every rank has all of the model"
_TRACKED = "since the tracker logs the run"  # and the run's record is no place for comet's api_key
_OFFLOADS = "checkpoints need the optimizer where it trains"  # NCCL gathers its parts over ranks from there
# Keys under which the run would go wrong, mostly without a word: the one value that is fine, and why.
_NEEDED: dict[str, tuple[Any, str]] = {
    "managed_gradient_accumulation": (True, "else every micro-batch would be an update"),
    "gradient_allreduce_op": ("mean", "since the mean over ranks of the losses is the batch's"),
    "zero_optimization.round_robin_gradients": (False, "since LARS and checkpoints find parameters in plain order"),
    "zero_optimization.compute_grad_norm": (True, "since the norm tells a sick step"),
    "zero_optimization.offload_optimizer": (None, _OFFLOADS),
    "zero_optimization.offload_param": (None, _OFFLOADS),
    "zero_optimization.cpu_offload": (False, _OFFLOADS),
    "zero_optimization.cpu_offload_param": (False, _OFFLOADS),
    "zero_optimization.zenflow": (None, _OFFLOADS),
    "tensor_parallel": (None, _WHOLE),
    "expert_parallel": (None, _WHOLE),
    "sequence_parallel_size": (1, _WHOLE),
    "hybrid_engine": (None, "since nothing is generated here"),
    "data_efficiency": (None, "since the recipe's plan says which samples a step takes"),
    "wandb": (None, _TRACKED),
    "comet": (None, _TRACKED),
}


def deepspeed_config(
    config: EngineConfig,
    *,
    global_batch_size: int,
    world_size: int,
    gradient_clipping: float | None,
    num_micro_batches: int = 1,
) -> dict[str, Any]:
    """What DeepSpeed is told: the recipe's words, and those of the user's own file.

    Raises:
        UserError: the file cannot be read, or contradicts the recipe; every such key is named.
    """
    own: dict[str, Any] = {
        "train_batch_size": global_batch_size,
        "train_micro_batch_size_per_gpu": global_batch_size // world_size // num_micro_batches,
        "gradient_accumulation_steps": num_micro_batches,
        # DeepSpeed's default is 1.0; 0 is off.
        "gradient_clipping": gradient_clipping or 0.0,
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 40,
    }
    if config.deepspeed_config is None:
        return own
    named = f"engine.deepspeed_config={config.deepspeed_config}"
    try:
        given = json.loads(Path(config.deepspeed_config).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{named} cannot be read as JSON ({error}): check the path and the file") from None
    if not isinstance(given, dict):
        raise UserError(f"{named} holds no object of options: check the file")
    contradictions = _merge(own, given)
    if contradictions:
        raise UserError(f"{named} contradicts the recipe: {'; '.join(contradictions)}")
    return own


def _merge(own: dict[str, Any], given: dict[str, Any], prefix: str = "") -> list[str]:
    """Add what is given to ``own``, in place; returns a phrase for each key that contradicts it."""
    contradictions = []
    for key, value in given.items():
        path, phrase = prefix + key, f"{prefix}{key}={_shown(value)} there"
        if isinstance(own.get(key), dict) and value != "auto":
            if isinstance(value, dict):
                contradictions += _merge(own[key], value, f"{path}.")
            else:
                contradictions.append(f"{phrase} is no object, write {json.dumps(own[key])}")
        elif path in _NEEDED:
            needed, reason = _NEEDED[path]
            if value not in ("auto", needed, None) and not _is_off(value):
                contradictions.append(f"{phrase} must be {json.dumps(needed)}, {reason}")
        elif path in _DECIDED_BY and value not in ("auto", own.get(key)) and not _is_off(value):
            says = f"is {json.dumps(own[key])}" if key in own else "has no place"
            contradictions.append(f"{phrase} {says} here, set {_DECIDED_BY[path]}")
        elif value != "auto" and path not in _DECIDED_BY:
            own[key] = value
    return contradictions


def _shown(value: Any) -> str:
    """As it stands in the file, but for comet's key, which is no word for logs."""
    return json.dumps({**value, "api_key": "..."} if isinstance(value, dict) and "api_key" in value else value)


def _is_off(section: Any) -> bool:
    """A section such as ``"fp16": {"enabled": false}`` or ``{"device": "none"}``, which asks for nothing."""
    return isinstance(section, dict) and (section.get("enabled") in (False, "auto") or section.get("device") == "none")
