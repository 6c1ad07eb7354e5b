"""A step in micro-batches is the plain step: the same negatives, the same update."""

import dataclasses
import os

import pytest
import torch
import torch.distributed as dist

from audiotext_dist.distributed import World
from audiotext_dist.losses.config import LossConfig
from audiotext_dist.losses.contrastive import contrastive_loss
from audiotext_dist.losses.targets import recording_ids
from audiotext_dist.models.dual_encoder import ModelInputs, build_model
from audiotext_dist.training.engine import Engine, start_process_group
from audiotext_dist.training.engine_config import EngineConfig, deepspeed_config
from audiotext_dist.training.step import seed_step, update
from tests.losses.cases import NUM_ROWS, RECORDINGS, rows
from tests.losses.naive import naive_loss
from tests.losses.small_model import AveragingEngine, SmallModel, gradients, watch
from tests.models.test_dual_encoder import TINY, make_inputs
from tests.ranks import run_on_ranks

CONFIG = LossConfig(recording_weight=1.0, recording_form="mean_a_row", tile_bytes=2000)


def loss_of(own: slice):
    ids = recording_ids(RECORDINGS)[own]
    return lambda a, b, scale, bias: contrastive_loss(a, b, scale, CONFIG, recording_n=ids)


def trained(own: slice, zero_stage: int, num_micro_batches: int, world_size: int) -> tuple[list, list[float], int]:
    """Three steps under DeepSpeed: parameters, the losses, and the tensors that were reduced over ranks."""
    model = SmallModel(bias=False, dtype=torch.float32)
    engine = Engine(
        model,
        # Unlike Adam, it tells gradients that are all a third too small.
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        deepspeed_config(
            EngineConfig(zero_stage=zero_stage),
            global_batch_size=NUM_ROWS,
            world_size=world_size,
            gradient_clipping=None,
            num_micro_batches=num_micro_batches,
        ),
    )
    engine.train()
    counted = []
    reductions = ("all_reduce", "reduce_scatter_tensor", "reduce_scatter", "reduce", "all_gather_into_tensor")
    real = {name: getattr(dist, name) for name in reductions}
    for name, function in real.items():
        setattr(dist, name, lambda *args, _function=function, **kwargs: counted.append(1) or _function(*args, **kwargs))
    losses = []
    for step in range(3):
        inputs = ModelInputs(waveform_NS=rows(step).float()[own], tokens_NC=rows(step + 9).float()[own])
        losses.append(update(engine, model, inputs, loss_of(own), watch()).loss)
    for name, function in real.items():
        setattr(dist, name, function)
    # Plain numbers: a tensor's memory would have to outlive its process.
    return [parameter.tolist() for parameter in model.parameters()], losses, len(counted)


def under_deepspeed(rank: int, world_size: int) -> list[tuple]:
    os.environ.update(
        RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{world_size}", LOCAL_WORLD_SIZE=f"{world_size}"
    )
    start_process_group(World.from_environment())
    own = slice(rank * NUM_ROWS // world_size, (rank + 1) * NUM_ROWS // world_size)
    return [
        (stage, num_micro_batches, *trained(own, stage, num_micro_batches, world_size))
        for stage in (0, 1, 2)
        for num_micro_batches in (1, 3)
    ]


@pytest.fixture(scope="module")
def on_two_ranks():
    return run_on_ranks(under_deepspeed, 2, 2)


def test_under_deepspeed_micro_batches_give_the_same_parameters_for_one_reduction_a_step_but_under_zero_2(on_two_ranks):
    started = list(SmallModel(bias=False, dtype=torch.float32).parameters())
    for of_rank in on_two_ranks:
        expected, losses, _ = of_rank[0][2:]
        num_reductions = {(stage, num): reductions for stage, num, _, _, reductions in of_rank}
        assert all(one != start.tolist() for one, start in zip(expected, started, strict=True))
        for _, _, parameters, own_losses, _ in of_rank:
            for one, other in zip(parameters, expected, strict=True):
                torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=0, atol=1e-6)
            assert own_losses == pytest.approx(losses, abs=1e-5)
        assert all(num_reductions[stage, 3] == num_reductions[stage, 1] for stage in (0, 1))
        # Two more backwards in each of three steps, and the whole model is one bucket.
        assert num_reductions[2, 3] == num_reductions[2, 1] + 2 * 3


def test_dropout_is_the_same_in_both_passes():
    model, reference = (SmallModel(bias=True, dropout=0.4) for _ in range(2))
    config = LossConfig(name="sigmoid")
    inputs = ModelInputs(waveform_NS=rows(1), tokens_NC=rows(2))
    torch.manual_seed(3)
    result = update(
        AveragingEngine(model, 3),
        model,
        inputs,
        lambda a, b, scale, bias: contrastive_loss(a, b, scale, config, bias=bias),
        watch(),
    )
    after = torch.rand(1)
    torch.manual_seed(3)
    parts = [
        reference(ModelInputs(waveform_NS=a, tokens_NC=b))
        for a, b in zip(rows(1).chunk(3), rows(2).chunk(3), strict=True)
    ]
    a, b = (torch.cat(side) for side in zip(*parts, strict=True))
    loss = naive_loss(config, a, b, reference.scale(), reference.logit_bias)
    loss.backward()
    assert result.loss == pytest.approx(loss.item())
    for own, other in zip(gradients(model), gradients(reference), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-10)
    assert torch.equal(after, torch.rand(1)), "the next step draws other numbers than this one"


def test_specaugment_hides_the_same_in_both_passes():
    found = []
    for num_micro_batches, uniforms in ((1, True), (3, True), (1, False)):
        torch.manual_seed(0)
        model = build_model(TINY, "audio-text", 16000)
        inputs = dataclasses.replace(make_inputs(6), frames_NHWC=None)
        if not uniforms:
            inputs = dataclasses.replace(inputs, mask_uniforms_N4=None)
        update(
            AveragingEngine(model, num_micro_batches),
            model,
            inputs,
            lambda a, b, scale, bias: contrastive_loss(a, b, scale),
            watch(),
        )
        found.append(torch.cat([gradient.flatten() for gradient in gradients(model) if gradient is not None]))
    whole, by_parts, unhidden = found
    assert (by_parts - whole).norm() < 1e-4 * whole.norm()
    assert (unhidden - whole).norm() > 1e-2 * whole.norm()


def test_random_numbers_are_those_of_seed_step_and_rank():
    drawn = {}
    for place in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]:
        for _ in range(2):
            seed_step(*place)
            drawn.setdefault(place, set()).add(torch.rand(1).item())
    assert [len(numbers) for numbers in drawn.values()] == [1] * 4
    assert len(set.union(*drawn.values())) == 4


@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_a_loss_that_is_no_number_goes_no_further(num_micro_batches):
    model = SmallModel(bias=False)
    inputs = ModelInputs(waveform_NS=rows(1) * torch.nan, tokens_NC=rows(2))
    result = update(AveragingEngine(model, num_micro_batches), model, inputs, loss_of(slice(None)), watch())
    assert (result.sickness, result.gradient_norm) == ("loss", None)
    assert model.a.grad is None
