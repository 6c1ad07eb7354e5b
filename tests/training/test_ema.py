"""The average of the weights: what it is, and who takes it."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch
from torch import nn

from audiotext_dist.training.checkpoint_folder import newest_whole
from audiotext_dist.training.ema import Ema
from audiotext_dist.training.prepare import Prepared
from audiotext_dist.training.weights import read_weights
from tests.ranks import run_on_ranks
from tests.training.runs import train_with_faults, write_training_set


def test_the_average_follows_its_formula_in_float32() -> None:
    model = nn.Linear(3, 2, dtype=torch.bfloat16)
    model.bias.requires_grad_(False)
    ema, expected = Ema(model, 0.9), model.weight.double()
    for step in range(20):
        nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(step))
        ema.update()
        expected = 0.9 * expected + 0.1 * model.weight.double()
    assert list(ema.state()) == ["weight"]
    torch.testing.assert_close(ema.state()["weight"], expected.float().detach())


def test_the_model_gets_its_weights_back_to_the_bit() -> None:
    model = nn.Linear(3, 2)
    ema, start = Ema(model, 0.5), model.weight.detach().clone()
    nn.init.ones_(model.weight)
    with ema.in_the_model():
        assert torch.equal(model.weight, start)
    assert torch.equal(model.weight, torch.ones(2, 3))
    assert torch.equal(ema.state()["weight"], start)


def weights_in_evaluation(rank: int, words: list[list[str]]) -> list[dict[str, list[float]]]:
    """The audio projection while each run evaluates, as its checkpoint's readers find it."""
    seen = []
    with mock.patch.object(Prepared, "evaluate", lambda self, _: seen.append(projection(self.model)) or []):
        for own in words:
            train_with_faults(rank, own)
    return seen


def projection(model: nn.Module) -> list[float]:
    return model.get_parameter("audio.transformer.proj").flatten().tolist()


def test_evaluation_takes_the_average_unless_told_otherwise(tmp_path: Path) -> None:
    clips = write_training_set(tmp_path / "train")
    common = [f"data.train.own.shards={clips}", "training.max_steps=2", "training.ema_decay=0.5"]
    on, off = [*common, f"run_dir={tmp_path / 'on'}"], [*common, f"run_dir={tmp_path / 'off'}", "evaluation.ema=false"]
    (in_on, in_off), *_ = run_on_ranks(weights_in_evaluation, 1, [on, off])
    for run in ("on", "off"):
        step = newest_whole(tmp_path / run)
        averaged, last = (read_weights(str(step), ema=ema)["audio.transformer.proj"].flatten() for ema in (True, False))
        assert not torch.equal(averaged, last)
        assert (in_on if run == "on" else in_off) == (averaged if run == "on" else last).tolist()
        file = read_weights(str(step / "model.safetensors"))["audio.transformer.proj"]
        assert torch.equal(file.flatten(), last)
