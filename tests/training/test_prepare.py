"""Towers that start from others: what the audio tower is a copy of, and a model that goes on where another stopped."""

import math

import fsspec
import pytest
import torch
from safetensors.torch import save_file

from audiotext_dist.distributed import World
from audiotext_dist.errors import UserError
from audiotext_dist.training.prepare import prepare
from audiotext_dist.training.recipe import read_recipe
from tests.clips import SAMPLE_RATE_HZ, make_sample, write_shards
from tests.object_store import server, use
from tests.training.runs import SMALL


def test_the_audio_tower_copies_the_image_tower_that_another_run_trained(tmp_path):
    shards = write_shards(tmp_path / "set", [[make_sample(row) for row in range(4)]])
    words = [
        "name=test",
        "task=audio-image",
        f"run_dir={tmp_path / 'run'}",
        f"data.train.own.shards={shards}",
        f"data.sample_rate_hz={SAMPLE_RATE_HZ}",
        "training.global_batch_size=4",
        "model.image.name=tiny-64",
        "model.audio.init_from_image=true",
    ]
    fresh = prepare(read_recipe(words), World()).model
    trained = {f"image.{name}": value + 1 for name, value in fresh.image.state_dict().items()}
    save_file(trained, tmp_path / "image.safetensors")
    model = prepare(read_recipe([*words, f"model.image.init={tmp_path / 'image.safetensors'}"]), World()).model
    for copied, image in (
        (model.audio.transformer.proj, model.image.visual.proj),
        (model.audio.transformer.conv1.weight, model.image.visual.conv1.weight),
    ):
        assert torch.equal(copied, image)
    assert torch.equal(model.image.visual.proj, fresh.image.visual.proj + 1)
    assert torch.equal(fresh.audio.transformer.proj, fresh.image.visual.proj)


def test_a_model_starts_from_another_run_and_its_temperature_where_that_is_learned(tmp_path):
    shards = write_shards(tmp_path / "set", [[make_sample(row) for row in range(4)]])
    words = [
        "name=test",
        f"run_dir={tmp_path / 'run'}",
        f"data.train.own.shards={shards}",
        f"data.sample_rate_hz={SAMPLE_RATE_HZ}",
        "training.global_batch_size=4",
        "model.audio.name=tiny-audio-32",
        "model.text.name=tiny-64",
    ]
    trained = {name: value + 1 for name, value in prepare(read_recipe(words), World()).model.state_dict().items()}
    save_file(trained, tmp_path / "stage1.safetensors")
    words += [f"model.init={tmp_path / 'stage1.safetensors'}", "training.seed=1"]
    # Where the towers came from in the first place does not matter any more.
    words += ["model.text.pretrained=laion2b_s34b_b79k"]
    learned = prepare(read_recipe(words), World()).model.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in learned.items())
    frozen = prepare(
        read_recipe([*words, "model.learn_temperature=false", "model.init_temperature=0.05"]), World()
    ).model
    assert frozen.scale().item() == pytest.approx(20)
    assert torch.equal(frozen.state_dict()["audio.transformer.proj"], trained["audio.transformer.proj"])
    assert learned["logit_scale"].item() == pytest.approx(1 - math.log(0.07))
    with pytest.raises(UserError, match=r"model.init and model.text.init exclude each other"):
        read_recipe([*words, "model.text.init=elsewhere"])


def test_a_rank_that_would_not_wait_for_a_lost_shard_is_told_where_it_trains_and_nowhere_else(tmp_path):
    words = ["data.train.own.shards=none", "data.train.own.features=s3://bucket", "data.fetch_stall_seconds=60"]
    recipe = read_recipe([*SMALL, *words, f"run_dir={tmp_path}"])
    with pytest.raises(
        UserError,
        match=r"fetch_stall_seconds=60 let a rank wait 632 s .* engine.collective_timeout_seconds=600: raise that",
    ):
        prepare(recipe, World())


def test_copies_of_an_earlier_run_stop_every_rank_before_it_waits_for_others(tmp_path, monkeypatch):
    words = ["data.train.own.shards=none", f"run_dir={tmp_path}", "training.resume=never"]
    recipe = read_recipe([*SMALL, *words, "checkpoint.upload_to=s3://runs/mine"])
    with server() as endpoint:
        use(monkeypatch, endpoint)
        fsspec.filesystem("s3").mkdir("runs")
        fsspec.filesystem("s3").pipe_file("runs/mine/step-00000004/model.safetensors", b"")
        for rank in range(2):
            with pytest.raises(UserError, match=r"upload_to=s3://runs/mine holds checkpoints of an earlier run"):
                prepare(recipe, World(rank=rank, size=2))
