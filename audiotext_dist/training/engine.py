"""DeepSpeed, and nothing else knows of it: process group, ZeRO, gradient averaging, its checkpoint files."""

from __future__ import annotations

import logging
import math
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from audiotext_dist.distributed import World
from audiotext_dist.errors import UserError

# Without this DeepSpeed warns of a machine without accelerators, once a process.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

# Its progress notes would tear the progress bar.
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# Its shared-memory collectives on CPU serve inference only; compiling them costs half a minute at the first run,
# and a run that is killed meanwhile leaves a lock on which every later one waits.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How DeepSpeed shares the optimizer: ZeRO stage 0 (every rank holds all of it) or 1 (a part each)."""

    zero_stage: int = 0

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1):
            raise UserError(f"engine.zero_stage={self.zero_stage} is not supported: choose 0 or 1")


def start_process_group(world: World) -> None:
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
    deepspeed.init_distributed(dist_backend="nccl" if world.device.type == "cuda" else "gloo", verbose=False)


def stop_process_group() -> None:
    """Leave the process group."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# What DeepSpeed's ZeRO files hold besides tensors and plain values.
_SAFE_CLASSES = [LossScaler, ZeroStageEnum, fragment_address]


class _WeightsOnlyCheckpointEngine(TorchCheckpointEngine):  # type: ignore[misc]
    """DeepSpeed's own files, but never unpickled into arbitrary objects."""

    def load(self, path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals(_SAFE_CLASSES):
            return torch.load(path, map_location=map_location, weights_only=True)


class Engine:
    """A model and its optimizer under DeepSpeed.

    Gradients are averaged over ranks at ``backward``; ``step`` updates and clears them.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: EngineConfig,
        *,
        micro_batch_size: int,
        gradient_clipping: float | None,
    ) -> None:
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": micro_batch_size,
                "gradient_accumulation_steps": 1,
                # DeepSpeed's default is 1.0; 0 is off.
                "gradient_clipping": gradient_clipping or 0.0,
                "zero_optimization": {"stage": config.zero_stage},
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 1 << 40,
            },
        )
        self._zero_stage = config.zero_stage
        self._engine.checkpoint_engine = _WeightsOnlyCheckpointEngine()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, whose ``lr`` the schedule sets."""
        groups: list[dict[str, Any]] = self._optimizer.param_groups
        return groups

    def __call__(self, *inputs: Any) -> Any:
        """The model's forward."""
        return self._engine(*inputs)

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of this rank's loss, averaged over ranks."""
        self._engine.backward(loss)

    def step(self) -> float:
        """Update the parameters and clear the gradients; returns the gradient's norm before clipping.

        Where the norm is not finite, the same on every rank, nothing but the gradients has changed. That includes
        finite gradients so large that their squares are not: they would spoil the optimizer's sums for good.
        """
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
        return norm

    def train(self) -> None:
        """Training mode."""
        self._engine.train()

    def save(self, folder: Path, tag: str) -> None:
        """Write DeepSpeed's files of model and optimizer into ``folder/tag``; every rank calls it."""
        self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False)

    def load(self, folder: Path, tag: str) -> None:
        """Read what ``save`` wrote, on as many ranks. Rates and decay stay as this run's recipe has them.

        Raises:
            UserError: written by another number of ranks, or another model.
        """
        settings = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        try:
            path, _ = self._engine.load_checkpoint(str(folder), tag=tag)
        except (RuntimeError, KeyError, ValueError, OSError) as error:
            first_line = str(error).strip().splitlines()[0]
            raise UserError(f"{folder / tag} does not fit this recipe ({first_line}): use another run_dir") from None
        if path is None:
            raise UserError(f"{folder / tag} holds no DeepSpeed checkpoint: remove it")
        for group, own in zip(self.param_groups, settings, strict=True):
            group.update(own)
