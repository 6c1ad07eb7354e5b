"""Compiled towers say what plain ones say, for any size of batch, under the same names."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from audiotext_dist.distributed import World
from audiotext_dist.errors import UserError
from audiotext_dist.models.dual_encoder import DualEncoder, ModelInputs, build_model
from audiotext_dist.training.compiling import compile_towers
from audiotext_dist.training.prepare import prepare
from audiotext_dist.training.recipe import read_recipe
from tests.clips import SAMPLE_RATE_HZ
from tests.ranks import run_on_ranks
from tests.training.runs import SMALL, train_many, write_training_set


def small_model() -> DualEncoder:
    recipe = read_recipe([*SMALL, "data.train.own.shards=none"])
    torch.manual_seed(0)
    return build_model(recipe.model, recipe.task, SAMPLE_RATE_HZ)


def inputs_of(model: DualEncoder, num_clips: int) -> ModelInputs:
    assert model.text is not None
    generator = torch.Generator().manual_seed(num_clips)
    return ModelInputs(
        waveform_NS=torch.randint(-9000, 9000, (num_clips, SAMPLE_RATE_HZ), generator=generator, dtype=torch.int16),
        num_valid_samples_N=torch.full((num_clips,), SAMPLE_RATE_HZ),
        tokens_NC=model.text.tokenize([f"clip {number}" for number in range(num_clips)]),
    )


def test_other_sizes_of_batch_stop_compiling() -> None:
    plain, compiled = small_model(), small_model()
    # The graphs alone: inductor takes minutes (see the test below).
    compile_towers(compiled, backend="eager")
    assert list(compiled.state_dict()) == list(plain.state_dict())
    graphs = []
    for num_clips in (4, 3, 2):  # of one of the chunks in which FBANK is made, each number of which is a graph
        inputs = inputs_of(plain, num_clips)
        sides = []
        for model in (plain, compiled):
            model.train()
            a_ND, b_ND = model(inputs)
            (a_ND * b_ND).sum().backward()
            model.eval()
            with torch.no_grad():
                sides.append((a_ND, b_ND, *model(inputs)))
        torch.testing.assert_close(sides[0], sides[1], rtol=0, atol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert len(set(graphs[1:])) == 1
    for (name, one), other in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_a_run_compiles_where_it_is_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()  # what other tests compiled
    monkeypatch.setenv("CXX", "sh")  # the eager backend needs none
    monkeypatch.setattr("audiotext_dist.training.prepare.compile_towers", partial(compile_towers, backend="eager"))
    words = [*SMALL, f"data.train.own.shards={write_training_set(tmp_path / 'train')}", f"run_dir={tmp_path / 'run'}"]
    graphs = []
    for asked in ("false", "true"):
        model = prepare(read_recipe([*words, f"engine.compile={asked}"]), World()).model.eval()
        counters.clear()
        with torch.no_grad():
            model(inputs_of(model, 2))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == 0 < graphs[1]


def test_a_machine_without_a_compiler_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    words = ["data.train.own.shards=none", f"run_dir={tmp_path}", "engine.compile=true"]
    with pytest.raises(UserError, match=r"there is no no-such-compiler: install one, or set engine\.compile=false"):
        prepare(read_recipe([*SMALL, *words]), World())


@pytest.mark.faults
@pytest.mark.parametrize("activation_checkpointing", ["false", "true"])
def test_a_compiled_run_has_the_losses_of_the_plain_one(tmp_path: Path, activation_checkpointing: str) -> None:
    clips = write_training_set(tmp_path / "train")
    common = [
        f"data.train.own.shards={clips}",
        f"data.validation.own.shards={clips}",
        "evaluation.batch_size=10",
        "training.max_steps=4",
        "training.micro_batch_size=4",
        f"engine.activation_checkpointing={activation_checkpointing}",
    ]
    runs = [([*common, f"run_dir={tmp_path / value}", f"engine.compile={value}"], []) for value in ("false", "true")]
    plain, compiled = run_on_ranks(train_many, 1, runs)[0]
    print(max(abs(loss - compiled.losses[step]) for step, loss in plain.losses.items()))
    assert compiled.losses == pytest.approx(plain.losses, abs=1e-4)
    assert list(compiled.losses) == [1, 2, 3, 4]
