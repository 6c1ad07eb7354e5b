"""fp16: small gradients survive, and an overflow costs half the loss scale, not the run; see also test_sick_steps."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from audiotext_dist.distributed import World
from audiotext_dist.errors import UserError
from audiotext_dist.losses.config import LossConfig
from audiotext_dist.losses.contrastive import contrastive_loss
from audiotext_dist.models.dual_encoder import ModelInputs
from audiotext_dist.training.engine import Engine, start_process_group
from audiotext_dist.training.engine_config import EngineConfig, deepspeed_config
from audiotext_dist.training.health import Health, HealthWatch
from audiotext_dist.training.loss_scale import GROWTH_STEPS, INIT_LOSS_SCALE, LossScale
from audiotext_dist.training.step import update
from tests.losses.cases import rows
from tests.losses.small_model import AveragingEngine, SmallModel, watch
from tests.ranks import run_on_ranks


def test_the_scale_is_halved_by_an_overflow_and_doubled_by_many_updates() -> None:
    scale = LossScale().after(overflow=True)
    assert scale == LossScale(value=INIT_LOSS_SCALE / 2)
    for _ in range(GROWTH_STEPS - 1):
        scale = scale.after(overflow=False)
    assert scale == LossScale(value=INIT_LOSS_SCALE / 2, num_good_steps=GROWTH_STEPS - 1)
    assert scale.after(overflow=False) == LossScale()
    assert scale.after(overflow=True) == LossScale(value=INIT_LOSS_SCALE / 4)
    assert LossScale(value=1.0).after(overflow=True).value == 1.0


@pytest.mark.parametrize(("scale", "sickness"), [(2.0, "overflow"), (1.0, "gradient")])
def test_an_overflow_is_a_sickness_where_the_scale_cannot_fall(scale: float, sickness: str) -> None:
    model = SmallModel(bias=True)
    engine = AveragingEngine(model)
    engine.loss_scale = LossScale(value=scale)  # type: ignore[assignment]
    engine.step = lambda: float("inf")  # type: ignore[method-assign]
    result = update(
        engine,  # type: ignore[arg-type]
        model,  # type: ignore[arg-type]
        ModelInputs(waveform_NS=rows(1), tokens_NC=rows(2)),
        lambda a, b, scale, bias: contrastive_loss(a, b, scale, LossConfig(name="sigmoid"), bias=bias),
        watch(),
    )
    assert (result.sickness, result.loss_scale) == (sickness, scale)


def test_overflows_are_counted_but_end_no_run(tmp_path: Path) -> None:
    health = HealthWatch(Health(), spike_ratio=None, skip_spikes=False, max_sick_in_a_row=1, run_dir=tmp_path)
    for step in range(5):
        health.note(step, 1.0, "overflow", ["a"], World())
    assert (health.health.num_overflows, health.health.num_skipped) == (5, 5)
    health.note(5, 1.0, "gradient", ["a"], World())
    health.note(6, 1.0, "overflow", ["a"], World())
    with pytest.raises(UserError, match="2 steps in a row were skipped"):
        health.note(7, 1.0, "gradient", ["a"], World())


def weight_after_small_gradients(zero_stage: int, scale: LossScale | None) -> list[list[float]]:
    """One step of two micro-batches, whose gradients are below fp16's smallest number."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False)
    config = deepspeed_config(
        EngineConfig(zero_stage=zero_stage),
        global_batch_size=8,
        world_size=2,
        gradient_clipping=None,
        num_micro_batches=2,
    )
    engine = Engine(model, torch.optim.SGD(model.parameters(), lr=1e8), config, scale)
    dtype = torch.float32 if scale is None else torch.float16
    for x_BD in torch.ones(2, 2, 4):
        with torch.autocast("cpu", dtype=dtype, enabled=scale is not None):
            y_BD = engine(x_BD)
        engine.backward(y_BD.float().sum() * 2.0**-27)
        engine.step()
    return model.weight.tolist()  # type: ignore[no-any-return]


def weights_on_rank(rank: int) -> list[list[list[float]]]:
    os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    start_process_group(World.from_environment())
    return [weight_after_small_gradients(*how) for how in ((0, None), *((stage, LossScale()) for stage in (0, 1, 2)))]


def test_gradients_below_the_smallest_fp16_number_arrive() -> None:
    for expected, *found in run_on_ranks(weights_on_rank, 2):
        for each in found:
            assert each == expected
