"""DeepSpeed, and nothing else knows of it: process group, ZeRO, gradient averaging, who holds which state."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
from collections.abc import KeysView, Mapping
from datetime import timedelta
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from audiotext_dist.distributed import World, open_cpu_group
from audiotext_dist.errors import UserError, did_you_mean
from audiotext_dist.training.ema import Ema
from audiotext_dist.training.lars import LARS
from audiotext_dist.training.loss_scale import LossScale
from audiotext_dist.training.optimizer_state import OptimizerState, note_fragments

# Without this DeepSpeed warns of a machine without accelerators, once a process.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed

# Its progress notes would tear the progress bar.
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# Its shared-memory collectives on CPU serve inference only; compiling them costs half a minute at the first run,
# and a run that is killed meanwhile leaves a lock on which every later one waits.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def start_process_group(world: World, timeout_seconds: float = 600.0) -> None:
    """Join the process group that the launcher's environment describes, and share the cores fairly, unless
    OMP_NUM_THREADS says how many threads a process has.

    Without a launcher this process is a group of its own.
    """
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    elif "OMP_NUM_THREADS" not in os.environ:
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
    timeout = timedelta(seconds=timeout_seconds)
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timeout)
    open_cpu_group(timeout)


def lost_contact(error: RuntimeError) -> bool:
    """Whether a collective failed because of another rank, which has left or does not answer."""
    # gloo raises plain RuntimeErrors, which name its files.
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def stop_process_group() -> None:
    """Leave the process group."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Engine:
    """A model and its optimizer under DeepSpeed.

    Of a step's last micro-batch ``backward`` averages the gradients over ranks, and ``step`` updates and clears them;
    before, the two add up gradients on this rank. ZeRO 2 averages at every ``backward``, and adds up its parts.

    Args:
        config: from ``engine_config.deepspeed_config``.
        loss_scale: to start with; None scales no loss.
        ema: follows every update; None where no average is wanted.
        upper_bounds: what trained parameters are brought down to after every update.

    Raises:
        UserError: DeepSpeed does not understand the config.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: dict[str, Any],
        loss_scale: LossScale | None = None,
        ema: Ema | None = None,
        upper_bounds: Mapping[nn.Parameter, float] = MappingProxyType({}),
    ) -> None:
        _check_understood(config)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
            dist_init_required=False,
            config=config,
        )
        self.num_micro_batches = int(config["gradient_accumulation_steps"])
        self.loss_scale, self.ema = loss_scale, ema
        self._upper_bounds = {value: bound for value, bound in upper_bounds.items() if value.requires_grad}
        self._zero_stage = int(config["zero_optimization"]["stage"])
        self._lars = optimizer if isinstance(optimizer, LARS) else None
        if self._lars is not None and self._zero_stage:
            note_fragments(self._lars, self._optimizer)
        self._state = OptimizerState(model, self._optimizer, zero_stage=self._zero_stage)

    def optimizer_metrics(self) -> dict[str, float]:
        """What the optimizer says of its last update: LARS' trust ratios, over its matrices."""
        ratios = {} if self._lars is None else self._lars.trust_ratios()
        return {f"optim/{name}": ratio for name, ratio in ratios.items()}

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
        if self.loss_scale is not None:
            if self._zero_stage:
                # ZeRO multiplies and, in its step, divides by itself.
                self._optimizer.override_loss_scale(self.loss_scale.value)
            else:
                loss = loss * self.loss_scale.value
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
        norm = self._step_zero() if self._zero_stage else self._step_plain()
        if self.loss_scale is not None:
            self.loss_scale = self.loss_scale.after(overflow=not math.isfinite(norm))
        if math.isfinite(norm):
            for parameter, bound in self._upper_bounds.items():
                self._state.clamp(parameter, bound)
            if self.ema is not None:
                self.ema.update()
        return norm

    def _step_zero(self) -> float:
        """ZeRO agrees on the norm by itself, and skips."""
        self._engine.step()
        return float("inf") if self._optimizer.overflow else float(self._optimizer._global_grad_norm)

    def _step_plain(self) -> float:
        """Stage 0 has no guard of its own. The gradients are those of all ranks already, so all see the same norm."""
        owners = [parameter for group in self.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in owners if parameter.grad is not None]
        if self.loss_scale is not None:
            torch._foreach_mul_(gradients, 1 / self.loss_scale.value)
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if math.isfinite(norm):
            self._engine.step()
        else:
            self._engine.zero_grad()
            self._engine.micro_steps += 1  # as its step would: the next backward is another step's first
        return norm

    def train(self) -> None:
        """Training mode."""
        self._engine.train()

    def averaged_weights(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the model has the averages of its weights, where they are kept."""
        return contextlib.nullcontext() if self.ema is None else self.ema.in_the_model()

    def optimizer_state(self, *, on_this_rank: bool) -> dict[str, torch.Tensor]:
        """See ``OptimizerState.gathered``."""
        return self._state.gathered(on_this_rank=on_this_rank)

    def load_optimizer_state(self, state: dict[str, torch.Tensor]) -> None:
        """See ``OptimizerState.load``."""
        self._state.load(state)


class _Asked(dict[str, Any]):
    """Options that note each key DeepSpeed asks them for, whether it is there or not: no list of its keys exists."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(options)
        self.known: set[str] = set()  # shared with its shallow copies

    def __contains__(self, key: object) -> bool:
        self.known.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """As of a dict."""
        self.known.add(key)
        return super().get(key, default)

    def keys(self) -> KeysView[str]:  # type: ignore[override]
        """A view that asks ``__contains__``."""
        return KeysView(self)


def _check_understood(config: dict[str, Any]) -> None:
    asked = _Asked(config)
    try:
        understood = deepspeed.DeepSpeedConfig(asked)
    # Whatever comes: pydantic's errors, assertions, TypeErrors of what is no section.
    except Exception as error:
        reason = " ".join(str(error).split()).partition(" For further information")[0]
        raise UserError(f"DeepSpeed does not understand its options ({reason}): mend engine.deepspeed_config") from None
    unknown = sorted(config.keys() - asked.known)
    if unknown:
        mend = did_you_mean(unknown[0], asked.known, otherwise="take it out")
        raise UserError(f"DeepSpeed knows no option '{unknown[0]}' of engine.deepspeed_config: {mend}")
    _check_agreement(understood)


def _check_agreement(understood: Any) -> None:
    """Raise ``UserError`` where DeepSpeed means to compute in another precision, by whatever spelling."""
    for option, is_on in (
        ("fp16", understood.float16_config.enabled),
        ("bf16", understood.bfloat16_config.enabled),
        ("torch_autocast", understood.torch_autocast_enabled),
    ):
        if is_on:
            raise UserError(
                f"DeepSpeed would turn {option} on by engine.deepspeed_config, where training.precision decides: mend "
                "that file"
            )
