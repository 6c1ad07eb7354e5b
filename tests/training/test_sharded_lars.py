"""LARS under ZeRO, where no rank holds whole parameters, is LARS in one process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from audiotext_dist.distributed import World
from audiotext_dist.training.engine import Engine, start_process_group
from audiotext_dist.training.engine_config import EngineConfig, deepspeed_config
from audiotext_dist.training.lars import LARS
from audiotext_dist.training.optim import OptimConfig, build_optimizer, set_learning_rates
from tests.ranks import run_on_ranks

# Matrices that lie on one rank, across two, and on all; vectors between them; one that starts from zero.
SHAPES = [(7, 5), (5,), (3, 2, 2), (1,), (40, 3), (6,), (2, 2)]
NUM_STEPS, SAVED_STEP = 50, 25
OPTIM = OptimConfig(
    name="lars",
    weight_lr=0.3,
    bias_lr=0.01,
    weight_decay=1e-2,
    trust_coefficient=0.02,
    lr_scales={"each.4": 0.5},
    gradient_clipping=5.0,
)
Weights = list[list[float]]
# Weights after the last step, and the trust ratios that would be logged of it.
Trained = tuple[Weights, dict[str, float]]


class Parameters(nn.Module):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        super().__init__()
        self.each = nn.ParameterList(torch.randn(shape, generator=generator) for shape in SHAPES)
        nn.init.zeros_(self.each[-1])

    def forward(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """A loss with these gradients."""
        return torch.stack([(value * own).sum() for value, own in zip(self.each, gradients, strict=True)]).sum()

    def as_lists(self) -> Weights:
        return [value.flatten().tolist() for value in self.each]


def gradients_of(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step + 1)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def in_one_process() -> Trained:
    model = Parameters().double()
    optimizer = build_optimizer(model, OPTIM, global_batch_size=256)
    set_learning_rates(optimizer.param_groups, 1.0)
    for step in range(NUM_STEPS):
        for value, gradient in zip(model.each, gradients_of(step), strict=True):
            value.grad = gradient.double()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    assert isinstance(optimizer, LARS)
    return model.as_lists(), {f"optim/{name}": ratio for name, ratio in optimizer.trust_ratios().items()}


def train(rank: int, world_size: int, zero_stage: int, start: Path | None, saved: Path) -> Trained:
    model = Parameters()
    config = deepspeed_config(
        EngineConfig(zero_stage=zero_stage),
        global_batch_size=world_size,
        world_size=world_size,
        gradient_clipping=OPTIM.gradient_clipping,
    )
    if start is not None:
        model.load_state_dict(load_file(start / "model.safetensors"))
    engine = Engine(model, build_optimizer(model, OPTIM, global_batch_size=256), config)
    set_learning_rates(engine.param_groups, 1.0)
    if start is not None:
        engine.load_optimizer_state(load_file(start / "optimizer.safetensors"))
    # Of unequal size on the ranks, with the same mean.
    share = 2 * (rank + 1) / (world_size + 1)
    for step in range(0 if start is None else SAVED_STEP, NUM_STEPS):
        engine.backward(engine(gradients_of(step)) * share)
        engine.step()
        if step + 1 == SAVED_STEP:
            state = engine.optimizer_state(on_this_rank=rank == 0)
            if rank == 0:
                saved.mkdir(parents=True)
                save_file(state, saved / "optimizer.safetensors")
                weights = {key: value.clone() for key, value in model.state_dict().items()}
                save_file(weights, saved / "model.safetensors")
    return model.as_lists(), engine.optimizer_metrics()


def train_all(rank: int, world_size: int, starts: dict[str, Path | None], folder: Path) -> dict[str, Trained]:
    os.environ.update(RANK=f"{rank}", LOCAL_RANK="0", WORLD_SIZE=f"{world_size}", LOCAL_WORLD_SIZE="1")
    start_process_group(World.from_environment())
    return {
        f"{name}, then ZeRO {stage} on {world_size}": train(
            rank, world_size, stage, start, folder / f"{name}-{stage}-{world_size}"
        )
        for name, start in starts.items()
        for stage in (0, 1, 2)
    }


def check_equal(found: Weights, expected: Weights, name: str) -> None:
    pairs = [
        (torch.tensor(one).double(), torch.tensor(other).double()) for one, other in zip(found, expected, strict=True)
    ]
    # torch's maximum, since Python's passes a NaN over.
    difference = torch.stack([(one - other).abs().max() / other.abs().max() for one, other in pairs]).max()
    print(f"{name}: {difference:.1e} of a parameter's largest number")
    assert difference < 1e-6, name


@pytest.mark.parametrize("world_sizes", [(2,), pytest.param((2, 3), marks=pytest.mark.faults)])
def test_fifty_steps_under_zero_are_those_of_one_process(tmp_path: Path, world_sizes: tuple[int, ...]) -> None:
    expected, ratios = in_one_process()
    assert len(set(ratios.values())) == 3
    starts: dict[str, Path | None] = {"start": None}
    for world_size in world_sizes:
        for of_rank in run_on_ranks(train_all, world_size, world_size, starts, tmp_path):
            for name, (found, found_ratios) in of_rank.items():
                check_equal(found, expected, name)
                assert found_ratios == pytest.approx(ratios, rel=1e-5), name
        # What two ranks saved, three go on from.
        starts["ZeRO 1 on 2"] = tmp_path / "start-1-2"
