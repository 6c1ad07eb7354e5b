"""Two linear towers with a temperature, in any precision, and an engine that averages gradients as DeepSpeed does."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from audiotext_dist.models.dual_encoder import ModelInputs
from audiotext_dist.training.health import Health, HealthWatch

DIM = 8


class SmallModel(nn.Module):
    """Reads float rows where the real one reads sound and tokens."""

    def __init__(self, *, bias: bool, dropout: float = 0.0, dtype=torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.a = nn.Parameter(torch.randn(DIM, DIM, dtype=dtype, generator=generator))
        self.b = nn.Parameter(torch.randn(DIM, DIM, dtype=dtype, generator=generator))
        self.logit_scale = nn.Parameter(torch.full((1,), 2.0, dtype=dtype))
        self.logit_bias = nn.Parameter(torch.full((1,), -3.0, dtype=dtype)) if bias else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, inputs: ModelInputs):
        return tuple(
            functional.normalize(self.dropout(rows @ tower).tanh(), dim=-1)
            for rows, tower in ((inputs.waveform_NS, self.a), (inputs.tokens_NC, self.b))
        )

    def scale(self) -> torch.Tensor:
        return self.logit_scale.exp()


class AveragingEngine:
    """Gradients on this rank add up until the step's last micro-batch, whose step averages them over a group."""

    def __init__(self, model: nn.Module, num_micro_batches: int = 1, group=None) -> None:
        self.model, self.group = model, group
        self.num_micro_batches = self.left = num_micro_batches
        self.loss_scale = None

    def __call__(self, inputs):
        return self.model(inputs)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> float:
        self.left -= 1
        if self.left == 0 and dist.is_initialized():
            for parameter in self.model.parameters():
                dist.all_reduce(parameter.grad, group=self.group)
                parameter.grad /= dist.get_world_size(self.group)
        return 0.0


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters()]


def watch() -> HealthWatch:
    """Skips what is not finite, and nothing else."""
    return HealthWatch(Health(), spike_ratio=None, skip_spikes=False, max_sick_in_a_row=10, run_dir=Path())
