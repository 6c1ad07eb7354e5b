"""DeepSpeed, and nothing else knows of it: process group, ZeRO, gradient averaging, who holds which state."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from audiotext_dist.distributed import World, is_parallel
from audiotext_dist.errors import UserError, require_positive

# Without this DeepSpeed warns of a machine without accelerators, once a process.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed

# Its progress notes would tear the progress bar.
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# Its shared-memory collectives on CPU serve inference only; compiling them costs half a minute at the first run,
# and a run that is killed meanwhile leaves a lock on which every later one waits.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How DeepSpeed shares the optimizer: ZeRO stage 0 (every rank holds all of it), 1 (a part each), or 2 (and
    a part of the gradients each).

    collective_timeout_seconds: a rank that gives no sign of life for so long, and a collective that takes longer, end
    the run on all ranks.
    deepspeed_config: a JSON file with more of DeepSpeed's own options; a key that says otherwise than the recipe is
    refused.
    activation_checkpointing: compute the towers' activations again in the backward, to save their memory.
    """

    zero_stage: int = 0
    deepspeed_config: str | None = None
    activation_checkpointing: bool = False
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


def start_process_group(world: World, timeout_seconds: float = 600.0) -> None:
    """Join the process group that the launcher's environment describes, and share the cores fairly.

    Without a launcher this process is a group of its own.
    """
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    else:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // world.local_size))
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        os.environ.update(alone)
    deepspeed.init_distributed(
        dist_backend="nccl" if world.device.type == "cuda" else "gloo",
        verbose=False,
        timeout=timedelta(seconds=timeout_seconds),
    )


def lost_contact(error: RuntimeError) -> bool:
    """Whether a collective failed because of another rank, which has left or does not answer."""
    # gloo raises plain RuntimeErrors, which name its files.
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def stop_process_group() -> None:
    """Leave the process group."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# DeepSpeed's keys for what the recipe decides in its own way.
_DECIDED_BY = {
    "optimizer": "optim.name",
    "scheduler": "optim.warmup_epochs and optim.final_lr_share",
    "fp16": "training.precision",
    "bf16": "training.precision",
    "torch_autocast": "training.precision",
    "amp": "training.precision",
    "activation_checkpointing": "engine.activation_checkpointing",
    "gradient_clipping": "optim.gradient_clipping",
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.micro_batch_size",
    "zero_optimization.stage": "engine.zero_stage",
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
        path = prefix + key
        if isinstance(own.get(key), dict) and isinstance(value, dict):
            contradictions += _merge(own[key], value, f"{path}.")
        elif path in _DECIDED_BY and value != "auto" and value != own.get(key):
            says = f"is {json.dumps(own[key])}" if key in own else "has no place"
            contradictions.append(f"{path}={json.dumps(value)} there {says} here, set {_DECIDED_BY[path]}")
        elif value != "auto" and path not in _DECIDED_BY:
            own[key] = value
    return contradictions


class Engine:
    """A model and its optimizer under DeepSpeed.

    Of a step's last micro-batch ``backward`` averages the gradients over ranks, and ``step`` updates and clears them;
    before, the two add up gradients on this rank.

    Args:
        config: from ``deepspeed_config``.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: dict[str, Any],
    ) -> None:
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
            dist_init_required=False,
            config=config,
        )
        self.num_micro_batches = int(config["gradient_accumulation_steps"])
        self._zero_stage = int(config["zero_optimization"]["stage"])
        self._model = model

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, whose ``lr`` the schedule sets."""
        groups: list[dict[str, Any]] = self._optimizer.param_groups
        return groups

    def __call__(self, *inputs: Any) -> Any:
        """The model's forward."""
        return self._engine(*inputs)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of this rank's loss, or of a micro-batch's part of it."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> float:
        """Update the parameters and clear the gradients; returns the gradient's norm before clipping.

        It is called after each ``backward``, and before a step's last micro-batch it does nothing and returns 0.
        Where the norm is not finite, the same on every rank, nothing but the gradients has changed. That includes
        finite gradients so large that their squares are not: they would spoil the optimizer's sums for good.
        """
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return 0.0
        if self._zero_stage:
            # ZeRO agrees on the norm by itself, and skips.
            self._engine.step()
            return float("inf") if self._optimizer.overflow else float(self._optimizer._global_grad_norm)
        # Stage 0 has no guard of its own. The gradients are those of all ranks already, so all see the same norm.
        gradients = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        norm = float(torch.nn.utils.get_total_norm([each for each in gradients if each is not None]))
        if math.isfinite(norm):
            self._engine.step()
        else:
            self._engine.zero_grad()
            self._engine.micro_steps += 1  # as its step would: the next backward is another step's first
        return norm

    def train(self) -> None:
        """Training mode."""
        self._engine.train()

    def optimizer_state(self, *, on_this_rank: bool) -> dict[str, torch.Tensor]:
        """``parameter:key`` -> what the optimizer holds of each parameter, whole, on the CPU.

        Nothing in it depends on the number of ranks or the ZeRO stage. Every rank calls it, since a stage above 0
        gives each rank a part; the result is empty but where it is asked for.
        """
        state: dict[str, torch.Tensor] = {}
        for name, key, whole in self._gathered_state():
            if on_this_rank:
                state[f"{name}:{key}"] = whole.detach().cpu().clone()
        return state

    def load_optimizer_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take up what ``optimizer_state`` gave, after the model has its weights.

        Raises:
            UserError: of another model's parameters.
        """
        named = [(key.rpartition(":"), value) for key, value in state.items()]
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        known = {names[id(parameter)] for group in self._groups() for parameter in group}
        unknown = next((name for (name, _, _), _ in named if name not in known), None)
        if unknown is not None:
            raise UserError(
                f"the checkpoint's optimizer trained {unknown}, which this recipe does not: use another run_dir"
            )
        by_name: dict[str, dict[str, torch.Tensor]] = {}
        for (name, _, key), value in named:
            by_name.setdefault(name, {})[key] = value
        for number, group in enumerate(self._groups()):
            for parameter in group:
                for key, whole in by_name.get(names[id(parameter)], {}).items():
                    self._put(number, parameter, key, whole)
        if self._zero_stage:
            self._optimizer.refresh_fp32_params()

    def _groups(self) -> list[list[nn.Parameter]]:
        """The model's own parameters, group by group."""
        if self._zero_stage:
            groups: list[list[nn.Parameter]] = self._optimizer.bit16_groups
            return groups
        return [group["params"] for group in self.param_groups]

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
            # Adam's count of updates, which its sums over the whole group share; PyTorch keeps it on the CPU.
            state[key] = whole.clone()
        elif not self._zero_stage:
            state[key] = whole.to(parameter.device)
        else:
            # Also where this rank's part is nothing but padding: the optimizer wants its keys.
            if key not in state:
                state[key] = torch.zeros_like(updated)
            if (own := _own_part(parameter)) is not None:
                in_parameter, in_flat = own
                state[key][in_flat] = whole.flatten()[in_parameter].to(updated.device)


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
