"""What the optimizer holds of each parameter, whole, whoever holds which part of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from audiotext_dist.distributed import is_parallel
from audiotext_dist.errors import UserError
from audiotext_dist.training.lars import LARS, Fragment


class OptimizerState:
    """Reads and writes the state of a model's optimizer, parameter by parameter.

    Args:
        optimizer: DeepSpeed's around the own one under ZeRO 1 and 2, else the own one itself.
    """

    def __init__(self, model: nn.Module, optimizer: Any, *, zero_stage: int) -> None:
        self._model, self._optimizer, self._zero_stage = model, optimizer, zero_stage

    def gathered(self, *, on_this_rank: bool) -> dict[str, torch.Tensor]:
        """``parameter:key`` -> what the optimizer holds of each parameter, whole, on the CPU.

        Nothing in it depends on the number of ranks or the ZeRO stage. Every rank calls it, since a stage above 0
        gives each rank a part; the result is empty but where it is asked for.
        """
        state: dict[str, torch.Tensor] = {}
        for name, key, whole in self._gathered_state():
            if on_this_rank:
                state[f"{name}:{key}"] = whole.detach().cpu().clone()
        return state

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Take up what ``gathered`` gave, after the model has its weights.

        Raises:
            UserError: of other parameters than are trained now.
        """
        named = [(key.rpartition(":"), value) for key, value in state.items()]
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        trained = [names[id(parameter)] for group in self._groups() for parameter in group]
        unknown = next((name for (name, _, _), _ in named if name not in trained), None)
        if unknown is not None:
            raise UserError(
                f"the checkpoint's optimizer trained {unknown}, which this recipe does not: use another run_dir"
            )
        by_name: dict[str, dict[str, torch.Tensor]] = {}
        for (name, _, key), value in named:
            by_name.setdefault(name, {})[key] = value
        # Where every step so far was skipped, it holds nothing of any.
        missing = next((name for name in trained if by_name and name not in by_name), None)
        if missing is not None:
            raise UserError(
                f"this recipe trains {missing}, which the checkpoint's optimizer did not: use another run_dir"
            )
        for number, group in enumerate(self._groups()):
            for parameter in group:
                for key, whole in by_name.get(names[id(parameter)], {}).items():
                    self._put(number, parameter, key, whole)
        if self._zero_stage:
            self._optimizer.refresh_fp32_params()

    @torch.no_grad()
    def clamp(self, parameter: nn.Parameter, upper_bound: float) -> None:
        """Bring a trained parameter down to a bound, ZeRO's own copy of it too, from which it is updated."""
        parameter.clamp_(max=upper_bound)
        if self._zero_stage and parameter._hp_mapping is not None:  # type: ignore[attr-defined]
            parameter._hp_mapping.hp_fragment.clamp_(max=upper_bound)  # type: ignore[attr-defined]

    def _groups(self) -> list[list[nn.Parameter]]:
        """The model's own parameters, group by group."""
        if self._zero_stage:
            groups: list[list[nn.Parameter]] = self._optimizer.bit16_groups
            return groups
        return [group["params"] for group in self._optimizer.param_groups]

    def _torch_state(self, number: int, parameter: nn.Parameter) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The tensor that the optimizer updates for this parameter, and its state: a part of the group under ZeRO."""
        if not self._zero_stage:
            return parameter, self._optimizer.state[parameter]
        flat = self._optimizer.single_partition_of_fp32_groups[number]
        return flat, self._optimizer.optimizer.state[flat]

    def _gathered_state(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """(parameter, key, whole state), one at a time, in one order on every rank."""
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        for number, group in enumerate(self._groups()):
            for parameter in group:
                updated, state = self._torch_state(number, parameter)
                for key, value in sorted(state.items()):
                    if not self._zero_stage or value.shape != updated.shape:
                        yield names[id(parameter)], key, value
                        continue
                    whole = torch.zeros(parameter.numel(), dtype=value.dtype, device=value.device)
                    if (own := _own_part(parameter)) is not None:
                        in_parameter, in_flat = own
                        whole[in_parameter] = value[in_flat]
                    if is_parallel():
                        torch.distributed.all_reduce(whole)
                    yield names[id(parameter)], key, whole.view(parameter.shape)

    def _put(self, number: int, parameter: nn.Parameter, key: str, whole: torch.Tensor) -> None:
        updated, state = self._torch_state(number, parameter)
        if whole.dim() == 0:
            # Adam's count of updates, which its sums over the whole group share; a fused one reads it on the device.
            is_fused = self._optimizer.param_groups[number].get("fused")
            state[key] = whole.to(updated.device if is_fused else "cpu", copy=True)
        elif not self._zero_stage:
            state[key] = whole.to(parameter.device)
        else:
            # Also where this rank's part is nothing but padding: the optimizer wants its keys.
            if key not in state:
                state[key] = torch.zeros_like(updated)
            if (own := _own_part(parameter)) is not None:
                in_parameter, in_flat = own
                state[key][in_flat] = whole.flatten()[in_parameter].to(updated.device)


def note_fragments(lars: LARS, zero: Any) -> None:
    """Tell LARS which parameters ZeRO's flat partitions on this rank are made of."""
    for parameters, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        own = [_own_part(parameter) for parameter in parameters]
        places = [slice(0, 0) if part is None else part[1] for part in own]
        lars.note_fragments(
            flat, [Fragment(place, parameter.ndim) for place, parameter in zip(places, parameters, strict=True)]
        )


def _own_part(parameter: nn.Parameter) -> tuple[slice, slice] | None:
    """What this rank's ZeRO partition holds of a parameter: its slice of the parameter, and of the partition."""
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    of_parameter, of_flat = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
    return (
        slice(of_parameter.start, of_parameter.start + of_parameter.numel),
        slice(of_flat.start, of_flat.start + of_flat.numel),
    )
