"""LARS, also where a rank holds only a part of the parameters, as under ZeRO 1 and 2."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, overload

import torch

from audiotext_dist.distributed import is_parallel


class Fragment(NamedTuple):
    """What a flat tensor holds of one parameter; ``place`` is empty where that is nothing.

    num_dims: of the whole parameter.
    """

    place: slice
    num_dims: int


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
        self._fragments: dict[torch.Tensor, Sequence[Fragment]] = {}
        # By parameter, since ZeRO makes a step of each group alone.
        self._last_ratios: dict[torch.Tensor, torch.Tensor] = {}

    def note_fragments(self, flat: torch.Tensor, fragments: Sequence[Fragment]) -> None:
        """Say that ``flat``, among the parameters, is this rank's share of whole ones, as many on every rank.

        From then on every ``step`` is a collective: a parameter's norm is that of its fragments on all ranks.
        """
        self._fragments[flat] = fragments

    def trust_ratios(self) -> dict[str, float]:
        """Least, median and greatest trust ratio of the matrices' last updates, the same on every rank; empty before
        the first ``step``.
        """
        if not self._last_ratios:
            return {}
        ratios = torch.cat(list(self._last_ratios.values()))
        summary = torch.stack([ratios.min(), ratios.median(), ratios.max()]).tolist()
        return dict(zip(("trust_ratio_min", "trust_ratio_median", "trust_ratio_max"), summary, strict=True))

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
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                update = self._scaled_update(parameter, group["weight_decay"], group["trust_coefficient"])
                velocity = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                parameter.add_(velocity, alpha=-group["lr"])
        return loss

    def _scaled_update(self, values: torch.Tensor, weight_decay: float, coefficient: float) -> torch.Tensor:
        """The gradient, with weight decay and times the trust ratio where these apply."""
        whole = Fragment(slice(None), values.ndim)
        matrices = [each.place for each in self._fragments.get(values, [whole]) if each.num_dims >= 2]
        assert values.grad is not None
        if not matrices:
            return values.grad
        update = values.grad.clone()
        for place in matrices:
            update[place].add_(values[place], alpha=weight_decay)
        squares_2P = torch.stack([_square_sums(side, matrices) for side in (values, update)])
        if values in self._fragments and is_parallel():
            torch.distributed.all_reduce(squares_2P)
        norm_P, update_norm_P = squares_2P.sqrt().to(update.dtype)
        ratio_P = coefficient * norm_P / update_norm_P
        # 1 where either norm is zero.
        ratio_P = ratio_P.where((norm_P > 0) & (update_norm_P > 0), 1.0)
        self._last_ratios[values] = ratio_P
        for place, ratio in zip(matrices, ratio_P, strict=True):
            update[place].mul_(ratio)
        return update


def _square_sums(values: torch.Tensor, places: Sequence[slice]) -> torch.Tensor:
    """The sum of squares at each place, in float64."""
    return torch.stack([values[place].double().square().sum() for place in places])
