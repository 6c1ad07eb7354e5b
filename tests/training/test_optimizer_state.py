"""What a checkpoint's optimizer trained is what is trained now, or the run does not go on."""

import pytest
import torch
from torch import nn

from audiotext_dist.errors import UserError
from audiotext_dist.training.optimizer_state import OptimizerState


def state_of(num_steps: int, *, frozen: str = "") -> OptimizerState:
    """Of two layers, of which one may be frozen, after so many steps."""
    model = nn.ModuleDict({"audio": nn.Linear(3, 2), "text": nn.Linear(3, 2)})
    if frozen:
        model[frozen].requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    for _ in range(num_steps):
        for parameter in trained:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return OptimizerState(model, optimizer, zero_stage=0)


def gathered(state: OptimizerState) -> dict[str, torch.Tensor]:
    return state.gathered(on_this_rank=True)


def test_it_is_taken_up_whole():
    told = gathered(state_of(3))
    fresh = state_of(0)
    fresh.load(told)
    assert told.keys() == gathered(fresh).keys()
    assert all(torch.equal(value, told[key]) for key, value in gathered(fresh).items())


def test_of_other_parameters_it_is_refused_by_name():
    whole, part = gathered(state_of(3)), gathered(state_of(3, frozen="text"))
    with pytest.raises(UserError, match=r"^this recipe trains text\.weight, which the checkpoint's optimizer did not"):
        state_of(0).load(part)
    with pytest.raises(UserError, match=r"^the checkpoint's optimizer trained text\.\w+, which this recipe does not"):
        state_of(0, frozen="text").load(whole)


def test_it_holds_nothing_where_every_step_was_skipped():
    told = gathered(state_of(0))
    assert told == {}
    fresh = state_of(0)
    fresh.load(told)
    assert gathered(fresh) == {}
