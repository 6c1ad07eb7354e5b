"""What DeepSpeed is told, and what is computed twice to save memory."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from audiotext_dist import distributed
from audiotext_dist.distributed import World
from audiotext_dist.errors import UserError
from audiotext_dist.models.dual_encoder import ModelInputs
from audiotext_dist.training.engine import Engine, start_process_group
from audiotext_dist.training.engine_config import EngineConfig, deepspeed_config
from audiotext_dist.training.prepare import prepare
from audiotext_dist.training.recipe import read_recipe
from tests.clips import SAMPLE_RATE_HZ
from tests.ranks import run_on_ranks
from tests.training.runs import SMALL, train_with_faults, write_training_set


def timeout_of_the_side_group(rank: int) -> float:
    os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    torch.distributed.get_backend = lambda: "nccl"  # type: ignore[assignment]  # in this process alone
    start_process_group(World.from_environment(), timeout_seconds=77)
    assert distributed.any_over_ranks(rank == 1)
    side = distributed._cpu_group._get_backend(torch.device("cpu"))
    return float(side.options._timeout.total_seconds())


def test_what_ranks_agree_on_over_the_cpu_has_the_timeout_of_all_collectives() -> None:
    assert run_on_ranks(timeout_of_the_side_group, 2) == [77, 77]


def told(file: Path) -> dict[str, object]:
    config = EngineConfig(zero_stage=1, deepspeed_config=str(file))
    return deepspeed_config(config, global_batch_size=16, world_size=2, gradient_clipping=None)


def test_a_file_adds_what_the_recipe_leaves_open(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    given = {
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 1000},
        "train_batch_size": "auto",
        "wall_clock_breakdown": True,
        "gradient_clipping": 0.0,
        "fp16": {"enabled": False},
        "bf16": {"enabled": "auto"},
    }
    file.write_text(json.dumps(given))
    found = told(file)
    assert not {"fp16", "bf16"} & set(found)
    assert found["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 1000}
    assert (found["wall_clock_breakdown"], found["train_batch_size"]) == (True, 16)


def test_every_key_that_contradicts_the_recipe_is_named(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    given = {
        "zero_optimization": {"stage": 2},
        "train_batch_size": 32,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "Adam"},
        "scheduler": {"type": "WarmupLR"},
        "fp16": {"enabled": True},
        "bf16": {"enabled": True, "immediate_grad_update": True},
        "bfloat16": {"enabled": True},
        "wall_clock_breakdown": True,
    }
    file.write_text(json.dumps(given))
    with pytest.raises(UserError) as met:
        told(file)
    for phrase in (
        "zero_optimization.stage=2 there is 1 here, set engine.zero_stage",
        "train_batch_size=32 there is 16 here",
        "gradient_clipping=1.0 there is 0.0 here, set optim.gradient_clipping",
        'optimizer={"type": "Adam"} there has no place here, set optim.name',
        'scheduler={"type": "WarmupLR"} there has no place here, set optim.warmup_epochs and optim.final_lr_share',
        'fp16={"enabled": true} there has no place here, set training.precision',
        'bf16={"enabled": true, "immediate_grad_update": true} there has no place here, set training.precision',
        'bfloat16={"enabled": true} there has no place here, set training.precision',
    ):
        assert phrase in str(met.value)
    assert "wall_clock" not in str(met.value)
    file.write_text("[not json")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        told(file)


@pytest.mark.parametrize(
    ("given", "phrase"),
    [
        ({"zero_optimization": 2}, 'zero_optimization=2 there is no object, write {"stage": 1}'),
        ({"zero_optimization": None}, "zero_optimization=null there is no object"),
        ({"zero_allow_untested_optimizer": False}, "untested_optimizer=false there is true here, set it to true"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            'offload_optimizer={"device": "cpu"} there must be null, checkpoints need',
        ),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "offload_param="),
        ({"zero_optimization": {"cpu_offload": True}}, "cpu_offload=true"),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "zenflow="),
        ({"zero_optimization": {"round_robin_gradients": True}}, "round_robin_gradients=true there must be false"),
        ({"zero_optimization": {"compute_grad_norm": False}}, "compute_grad_norm=false there must be true"),
        ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation=false there must be true"),
        ({"gradient_allreduce_op": "sum"}, 'gradient_allreduce_op="sum" there must be "mean"'),
        ({"tensor_parallel": {"autotp_size": 2}}, 'tensor_parallel={"autotp_size": 2} there must be null, since every'),
        ({"expert_parallel": {"enabled": True}}, "expert_parallel="),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size=2 there must be 1, since every rank"),
        ({"hybrid_engine": {"enabled": True}}, 'hybrid_engine={"enabled": true} there must be null, since nothing'),
        ({"data_efficiency": {"enabled": True}}, "data_efficiency="),
        ({"comet": {"enabled": True, "api_key": "k"}}, '"api_key": "..."} there must be null, since the tr'),
        (
            {"data_types": {"grad_accum_dtype": "bf16"}},
            'data_types={"grad_accum_dtype": "bf16"} there has no place here, set training.precision',
        ),
    ],
)
def test_what_would_break_the_run_later_is_refused(tmp_path: Path, given: object, phrase: str) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(given))
    with pytest.raises(UserError, match=re.escape(phrase)):
        told(file)


def test_a_section_that_asks_for_nothing_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    off = {"offload_optimizer": {"device": "none"}, "offload_param": None, "cpu_offload": False, "zenflow": None}
    fine = {"compute_grad_norm": True, "round_robin_gradients": False}
    file.write_text(json.dumps({"zero_optimization": off | fine, "managed_gradient_accumulation": True}))
    assert told(file)["zero_optimization"] == {"stage": 1}


def what_deepspeed_refuses(rank: int, configs: list[dict[str, object]]) -> list[str]:
    start_process_group(World())
    model, said = nn.Linear(4, 3), []
    for config in configs:
        with pytest.raises(UserError) as met:
            Engine(model, torch.optim.SGD(model.parameters()), config)
        said.append(str(met.value))
    return said


def test_what_deepspeed_does_not_understand_is_one_line(tmp_path: Path) -> None:
    file, configs = tmp_path / "ds.json", []
    for given in ({"zero_optimization": {"overlap_com": True}}, {"compile": 3}, {"checkpoint": {"tag_validation": 1}}):
        file.write_text(json.dumps(given))
        configs.append(told(file) | {"train_batch_size": 8})  # of one rank
    for said, named in zip(run_on_ranks(what_deepspeed_refuses, 1, configs)[0], ("overlap_com", "", ""), strict=True):
        assert re.fullmatch(rf"DeepSpeed does not understand its options \(.*{named}.*\): mend engine.*", said)


def test_what_deepspeed_does_not_know_or_takes_otherwise_is_named() -> None:
    config = deepspeed_config(EngineConfig(), global_batch_size=8, world_size=1, gradient_clipping=None)
    known = {"wall_clock_breakdown": True, "aio": {}, "flops_profiler": {}, "tensorboard": {"enabled": False}}
    taken = "DeepSpeed would turn {} on by engine.deepspeed_config, where training.precision decides: mend that file"
    cases = {
        "DeepSpeed knows no option 'graident_clipping' of engine.deepspeed_config: did you mean 'gradient_clipping'?": {
            "graident_clipping": 1.0
        },
        "DeepSpeed knows no option 'note_of_mine' of engine.deepspeed_config: take it out": {"note_of_mine": "fast"},
        taken.format("bf16"): {"bfloat16": {"enabled": True}},
        taken.format("fp16"): {"fp16": {"enabled": True}},
        taken.format("torch_autocast"): {"torch_autocast": {"enabled": True, "dtype": "bf16"}},
    }
    configs = [config | known | extra for extra in cases.values()]
    assert run_on_ranks(what_deepspeed_refuses, 1, configs)[0] == list(cases)


def test_a_run_keeps_what_deepspeed_was_told(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    off = {"comet": {"enabled": False, "api_key": "a-secret"}}
    file.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 1000}, **off}))
    words = [f"data.train.own.shards={write_training_set(tmp_path / 'train')}", f"run_dir={tmp_path / 'run'}"]
    run_on_ranks(train_with_faults, 1, [*words, f"engine.deepspeed_config={file}", "training.max_steps=1"])
    file.unlink()
    kept = json.loads((tmp_path / "run" / "deepspeed.json").read_text())
    assert kept["zero_optimization"] == {"stage": 0, "reduce_bucket_size": 1000}
    assert (kept["train_batch_size"], kept["gradient_clipping"]) == (12, 1)
    assert "comet" not in kept


def test_stage_3_is_refused_with_a_reason() -> None:
    with pytest.raises(UserError, match="cuts the weights themselves apart"):
        EngineConfig(zero_stage=3)


def test_activations_that_are_computed_again_give_the_same_gradients(tmp_path: Path) -> None:
    clips = write_training_set(tmp_path / "train")
    generator = torch.Generator().manual_seed(0)
    waveform_NS = torch.randint(-9000, 9000, (3, SAMPLE_RATE_HZ), generator=generator, dtype=torch.int16)
    gradients, saved_bytes = [], []
    for again in ("false", "true"):
        words = [f"data.train.own.shards={clips}", f"run_dir={tmp_path / again}"]
        model = prepare(read_recipe([*SMALL, *words, f"engine.activation_checkpointing={again}"]), World()).model
        assert model.text is not None
        inputs = ModelInputs(
            waveform_NS=waveform_NS,
            num_valid_samples_N=torch.full((3,), SAMPLE_RATE_HZ),
            tokens_NC=model.text.tokenize(["one", "two", "three"]),
        )
        saved_bytes.append(0)

        def count(tensor: torch.Tensor) -> torch.Tensor:
            saved_bytes[-1] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            first_ND, second_ND = model(inputs)
        (first_ND * second_ND).sum().backward()
        gradients.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    assert saved_bytes[1] < 0.7 * saved_bytes[0]
    torch.testing.assert_close(gradients[0], gradients[1])


def weights_after_each_step(rank: int, zero_stage: int, sick_step: int | None) -> list[list[list[float]]]:
    """Steps of two micro-batches; the sick one's gradients are not finite, and its data come again afterwards."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    config = deepspeed_config(
        EngineConfig(zero_stage=zero_stage),
        global_batch_size=8,
        world_size=1,
        gradient_clipping=None,
        num_micro_batches=2,
    )
    engine = Engine(model, torch.optim.AdamW(model.parameters(), lr=0.1), config)
    weights = []
    for step in range(4):
        is_sick, after = step == sick_step, sick_step is not None and step > sick_step
        for x_BD in torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(step - after)):
            engine.backward((engine(x_BD) ** 2).sum() * (float("nan") if is_sick else 1.0))
            norm = engine.step()
        assert math.isfinite(norm) == (not is_sick)  # of the last micro-batch
        weights.append(model.weight.tolist())  # a tensor's memory would have to outlive its process
    return weights


def compare_accumulated_steps(rank: int) -> list[tuple[list[list[list[float]]], list[list[list[float]]]]]:
    start_process_group(World())
    return [(weights_after_each_step(rank, zero, None), weights_after_each_step(rank, zero, 1)) for zero in (0, 1, 2)]


def test_a_sick_step_of_several_micro_batches_leaves_no_trace() -> None:
    for well, sick in run_on_ranks(compare_accumulated_steps, 1)[0]:
        assert sick[1] == sick[0]
        assert sick[2] == well[1]
        assert sick[3] == well[2]
        assert well[0] != well[1]


def a_bounded_weight(zero_stage: int) -> list[float]:
    """The weight after each of five steps up, under a bound of 1, and one down."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 0.8)
    config = deepspeed_config(
        EngineConfig(zero_stage=zero_stage), global_batch_size=1, world_size=1, gradient_clipping=None
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125)
    engine = Engine(model, optimizer, config, upper_bounds={model.weight: 1.0})
    weights = []
    for sign in (-1, -1, -1, -1, -1, 1):
        engine.backward(sign * engine(torch.ones(1, 1)).sum())
        engine.step()
        weights.append(model.weight.item())
    return weights


def bounded_weights(rank: int) -> list[list[float]]:
    start_process_group(World())
    return [a_bounded_weight(zero_stage) for zero_stage in (0, 1, 2)]


def test_a_parameter_with_a_bound_comes_back_from_it_at_once() -> None:
    for weights in run_on_ranks(bounded_weights, 1)[0]:
        assert weights == pytest.approx([0.925, 1, 1, 1, 1, 0.875])
