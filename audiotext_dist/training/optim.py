"""Optimizers, parameter groups and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import nn

from audiotext_dist.errors import UserError, require_positive

# LARS rates are stated for this batch (You et al. 2017; Temporal agreement, Table I).
LARS_REFERENCE_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer, learning rates and schedule.

    weight_lr, bias_lr: peak rates of parameters with two or more dimensions, and of the others (biases,
    norms, the temperature), which take no weight decay; bias_lr defaults to weight_lr. Under LARS both are
    multiplied by global_batch_size / 256. final_lr_share: where the cosine ends, as a share of the peak.
    """

    name: Literal["adamw", "lars"] = "adamw"
    weight_lr: float = 1e-3
    bias_lr: float | None = None
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    momentum: float = 0.9
    trust_coefficient: float = 0.001
    warmup_epochs: float = 1.0
    final_lr_share: float = 0.0
    gradient_clipping: float | None = None

    def __post_init__(self) -> None:
        require_positive(self, "optim", "eps", "trust_coefficient", "gradient_clipping")
        for key in ("weight_lr", "bias_lr", "warmup_epochs", "weight_decay"):
            value = getattr(self, key)
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"optim.{key}={value} must be 0 or more")
        if not all(0 <= share < 1 for share in (*self.betas, self.momentum)):
            raise UserError(f"optim.betas={list(self.betas)} and optim.momentum={self.momentum} must lie in [0, 1)")
        if not 0 <= self.final_lr_share <= 1:
            raise UserError(f"optim.final_lr_share={self.final_lr_share} must lie in [0, 1]")


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You, Gitman, Ginsburg 2017), with momentum.

    Weight decay and the trust ratio apply to parameters with two or more dimensions only.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust_coefficient": trust_coefficient},
        )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = parameter.grad
                if parameter.ndim >= 2:
                    update = update.add(parameter, alpha=group["weight_decay"])
                    update = update * _trust_ratio(parameter, update, group["trust_coefficient"])
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                velocity = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                parameter.add_(velocity, alpha=-group["lr"])
        return loss


def _trust_ratio(parameter: torch.Tensor, update: torch.Tensor, coefficient: float) -> torch.Tensor:
    """coefficient * |parameter| / |update|, or 1 where either norm is zero."""
    parameter_norm, update_norm = parameter.norm(), update.norm()
    ratio = coefficient * parameter_norm / update_norm
    return torch.where((parameter_norm > 0) & (update_norm > 0), ratio, torch.ones_like(ratio))


def build_optimizer(model: nn.Module, config: OptimConfig, *, global_batch_size: int) -> torch.optim.Optimizer:
    """The optimizer over every parameter that asks for a gradient, in two groups: weights, then the rest.

    Each group remembers its peak rate as ``peak_lr``; ``set_learning_rates`` scales from there.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    scale = global_batch_size / LARS_REFERENCE_BATCH if config.name == "lars" else 1.0
    bias_lr = config.weight_lr if config.bias_lr is None else config.bias_lr
    groups = [
        {
            "params": [parameter for parameter in trained if parameter.ndim >= 2],
            "peak_lr": scale * config.weight_lr,
            "weight_decay": config.weight_decay,
        },
        {
            "params": [parameter for parameter in trained if parameter.ndim < 2],
            "peak_lr": scale * bias_lr,
            "weight_decay": 0.0,
        },
    ]
    match config.name:
        case "adamw":
            return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps)
        case "lars":
            return LARS(groups, lr=0.0, momentum=config.momentum, trust_coefficient=config.trust_coefficient)


def schedule(step: int, *, warmup_steps: int, num_steps: int, final_share: float) -> float:
    """The share of the peak rate at a step counted from 0: linear warm-up, then a cosine to ``final_share``."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(num_steps - warmup_steps, 1)
    return final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def set_learning_rates(param_groups: list[dict[str, Any]], share: float) -> None:
    """Set every group's rate to this share of its peak."""
    for group in param_groups:
        group["lr"] = group["peak_lr"] * share
