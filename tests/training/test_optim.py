"""LARS against its formula written out, the groups, and the schedule."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from audiotext_dist.errors import UserError
from audiotext_dist.models.dual_encoder import build_model
from audiotext_dist.training.optim import (
    LARS,
    OptimConfig,
    build_optimizer,
    named_learning_rates,
    schedule,
    set_learning_rates,
)
from audiotext_dist.training.recipe import read_recipe
from tests.training.runs import SMALL

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"


def reference_lars(values, gradients, *, lr, momentum, weight_decay, eta):
    """One parameter through all gradients, by You et al. 2017, in plain floats."""
    value, velocity = values.double(), torch.zeros_like(values).double()
    for gradient in gradients:
        update = gradient.double()
        if value.dim() > 1:
            update = update + weight_decay * value
            norm, update_norm = math.sqrt((value**2).sum()), math.sqrt((update**2).sum())
            update = update * (eta * norm / update_norm if norm > 0 and update_norm > 0 else 1.0)
        velocity = momentum * velocity + update
        value = value - lr * velocity
    return value


@pytest.mark.parametrize("shape", [(6, 4), (5,), (3, 2, 2, 2), (1,)])
def test_lars_follows_its_formula_for_50_steps(shape):
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(shape, generator=generator))
    gradients = [torch.randn(shape, generator=generator) for _ in range(50)]
    expected = reference_lars(parameter.detach(), gradients, lr=0.3, momentum=0.9, weight_decay=1e-2, eta=0.001)
    optimizer = LARS([parameter], lr=0.3, weight_decay=1e-2)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(parameter.double(), expected, rtol=1e-6, atol=1e-6)


def test_table_i_of_temporal_agreement_for_50_steps():
    """Rates of weights and biases, both x 128/256, a warm-up, a cosine to 0.001: from formulas of its own."""
    recipe = read_recipe([f"recipe={RECIPES / 'temporal_agreement' / 'conventional_audio_image.yaml'}"])
    assert (recipe.training.num_epochs, recipe.training.global_batch_size, recipe.optim.warmup_epochs) == (30, 128, 10)
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4))
    optimizer = build_optimizer(model, recipe.optim, global_batch_size=128)
    values = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    velocities = {name: torch.zeros_like(value) for name, value in values.items()}
    for step in range(50):
        share = schedule(step, warmup_steps=17, decay_steps=50, final_share=recipe.optim.final_lr_share)
        set_learning_rates(optimizer.param_groups, share)
        if step < 17:
            expected_share = (step + 1) / 17
        else:
            q = 0.5 * (1 + math.cos(math.pi * (step - 17) / 33))
            expected_share = q + 0.001 * (1 - q)
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            update, rate = parameter.grad.double(), 4.8e-3
            if name == "0.weight":
                update, rate = update + 1e-6 * values[name], 2.0e-1
                update = update * 0.001 * values[name].norm() / update.norm()
            velocities[name] = 0.9 * velocities[name] + update
            values[name] = values[name] - 128 / 256 * rate * expected_share * velocities[name]
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.double(), values[name], rtol=1e-6, atol=1e-6)


def test_lars_tells_the_trust_ratios_of_its_matrices():
    shapes = [((2, 2), 1.0), ((3, 1), 8.0), ((2, 1), 2.0), ((4,), 1.0)]
    parameters = [torch.full(shape, value).requires_grad_() for shape, value in shapes]
    optimizer = LARS(parameters, lr=1.0, trust_coefficient=0.5)
    assert optimizer.trust_ratios() == {}
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 2.0)
    optimizer.step()
    expected = {"trust_ratio_min": 0.25, "trust_ratio_median": 0.5, "trust_ratio_max": 2.0}
    assert optimizer.trust_ratios() == pytest.approx(expected)


def test_lars_moves_a_zero_matrix_by_the_plain_rate():
    parameter = nn.Parameter(torch.zeros(2, 2))
    parameter.grad = torch.ones(2, 2)
    LARS([parameter], lr=0.1).step()
    torch.testing.assert_close(parameter.detach(), torch.full((2, 2), -0.1))


def test_groups_hold_trained_parameters_only_with_their_own_rates():
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    model[2].requires_grad_(False)
    config = OptimConfig(name="lars", weight_lr=0.2, bias_lr=0.0048, weight_decay=1e-6)
    weights, others = build_optimizer(model, config, global_batch_size=128).param_groups
    assert [tuple(parameter.shape) for parameter in weights["params"]] == [(3, 4)]
    assert len(others["params"]) == 3
    assert (weights["peak_lr"], others["peak_lr"]) == (0.1, 0.0024)
    assert (weights["weight_decay"], others["weight_decay"]) == (1e-6, 0.0)
    set_learning_rates([weights, others], 0.5)
    assert (weights["lr"], others["lr"]) == (0.05, 0.0012)


def test_adamw_rates_do_not_grow_with_the_batch():
    optimizer = build_optimizer(nn.Linear(4, 3), OptimConfig(weight_lr=2e-5), global_batch_size=1024)
    assert [group["peak_lr"] for group in optimizer.param_groups] == [2e-5, 2e-5]


def test_rates_by_the_beginning_of_names():
    model = nn.ModuleDict({"audio": nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), "audio_extra": nn.Linear(2, 2)})
    config = OptimConfig(weight_lr=1.0, bias_lr=0.5, weight_decay=0.1, lr_scales={"audio": 0.1, "audio.1": 2.0})
    optimizer = build_optimizer(model, config, global_batch_size=8)
    found = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    peaks = {name: found[id(parameter)]["peak_lr"] for name, parameter in model.named_parameters()}
    assert peaks == {
        "audio.0.weight": 0.1,
        "audio.0.bias": 0.05,
        "audio.1.weight": 2.0,
        "audio.1.bias": 1.0,
        "audio_extra.weight": 1.0,
        "audio_extra.bias": 0.5,
    }
    assert {group["weight_decay"] for group in optimizer.param_groups if group["params"][0].ndim < 2} == {0.0}
    set_learning_rates(optimizer.param_groups, 0.5)
    assert next(iter(named_learning_rates(optimizer.param_groups).items())) == ("optim/weight_lr", 0.5)
    assert named_learning_rates(optimizer.param_groups)["optim/bias_lr_x0.1"] == 0.025
    with pytest.raises(UserError, match=r"optim\.lr_scales\.audi is the beginning of no parameter's name"):
        build_optimizer(model, OptimConfig(lr_scales={"audi": 0.1}), global_batch_size=8)
    model["audio"][1].requires_grad_(False)
    assert build_optimizer(model, OptimConfig(lr_scales={"audio": 0.1}), global_batch_size=8)
    with pytest.raises(UserError, match=r"optim\.lr_scales\.audio\.1 trains nothing"):
        build_optimizer(model, config, global_batch_size=8)


def test_encoder_and_projection_have_own_rates_and_biases_and_norms_no_decay() -> None:
    scales = ["optim.lr_scales={audio: 0.1, audio.transformer.proj: 2}"]
    words = ["optim.weight_lr=1", "optim.bias_lr=0.5", "optim.weight_decay=0.2", "data.train.own.shards=none"]
    recipe = read_recipe([*SMALL, *scales, *words])
    model = build_model(recipe.model, recipe.task, recipe.data.sample_rate_hz)
    groups = build_optimizer(model, recipe.optim, global_batch_size=12).param_groups
    found = {id(parameter): group for group in groups for parameter in group["params"]}
    how = {
        name: (found[id(parameter)]["peak_lr"], found[id(parameter)]["weight_decay"])
        for name, parameter in model.named_parameters()
    }
    assert how["audio.transformer.proj"] == (2, 0.2)
    assert how["audio.transformer.transformer.resblocks.0.attn.in_proj_weight"] == (0.1, 0.2)
    assert how["audio.transformer.transformer.resblocks.0.attn.in_proj_bias"] == (0.05, 0)
    assert how["audio.transformer.ln_post.weight"] == (0.05, 0)
    assert how["text.transformer.text_projection"] == (1, 0.2)
    assert how["text.transformer.ln_final.bias"] == (0.5, 0)
    assert how["logit_scale"] == (0.5, 0)
    with pytest.raises(UserError, match="names with dots go in braces"):
        read_recipe([*SMALL, "optim.lr_scales.audio.transformer.proj=2", *words])


def test_schedule_warms_up_and_falls_as_a_cosine():
    shares = [schedule(step, warmup_steps=10, decay_steps=110, final_share=0.001) for step in range(110)]
    assert shares[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert shares[10] == 1.0
    assert shares[60] == pytest.approx(0.5 + 0.0005)
    assert shares[10:] == sorted(shares[10:], reverse=True)
    assert [schedule(step, warmup_steps=10, decay_steps=110, final_share=0.001) for step in (110, 500)] == [0.001] * 2
    assert schedule(0, warmup_steps=0, decay_steps=5, final_share=0.0) == 1.0


def test_a_cosine_that_would_end_before_the_warm_up_is_refused():
    with pytest.raises(UserError, match=r"optim.decay_epochs=1 must lie after optim.warmup_epochs=1"):
        OptimConfig(warmup_epochs=1, decay_epochs=1)
