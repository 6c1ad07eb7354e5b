"""Checkpoints are complete or invisible: what damage does, what is kept, what may go on from them."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from audiotext_dist.data.sets import DataOrder
from audiotext_dist.distributed import World
from audiotext_dist.errors import UserError
from audiotext_dist.training import checkpoint, checkpoint_folder, weights
from audiotext_dist.training.checkpoint import Progress
from audiotext_dist.training.prepare import prepare
from audiotext_dist.training.recipe import read_recipe
from audiotext_dist.training.saving import CheckpointConfig, Saver
from tests.clips import make_sample, write_shards
from tests.ranks import run_on_ranks
from tests.training.runs import SMALL, write_training_set

START = Progress(
    step=0,
    epoch=0,
    batch=0,
    seed=1,
    global_batch_size=8,
    steps_an_epoch=4,
    world_size=1,
    optimizer="adamw",
    order=DataOrder(num_lanes=8, window_shards=4, set_weights=(1.0, 0.3), shards="0123456789abcdef"),
)


class StateEngine:
    """Stands for the engine, whose real state tests/training/test_resume.py goes through."""

    ema = loss_scale = None

    def optimizer_state(self, *, on_this_rank):
        return {"weight:exp_avg": torch.ones(2, 3)} if on_this_rank else {}

    def load_optimizer_state(self, state):
        assert list(state) == ["weight:exp_avg"]


def save(run_dir, *steps, **config):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    saver = Saver(
        CheckpointConfig(**{"keep_last": 5, **config}), StateEngine(), model, run_dir, World(), "name: test\n"
    )
    for step in steps:
        assert saver.save(dataclasses.replace(START, step=step))
    saver.finish()
    return model


def newest(run_dir):
    found = checkpoint.find_newest_whole(run_dir, World())
    return None if found is None else found.name


@pytest.mark.parametrize(
    "file",
    [
        "optimizer.safetensors",
        "recipe.yaml",
        "model.safetensors",
        "progress.json",
        "manifest.json",
    ],
)
@pytest.mark.parametrize("damage", ["missing", "short", "flipped"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(tmp_path, file, damage):
    save(tmp_path, 1, 2)
    path = tmp_path / "checkpoints" / "step-00000002" / file
    content = path.read_bytes()
    match damage:
        case "missing":
            path.unlink()
        case "short":
            path.write_bytes(content[:-1])
        case "flipped":
            path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert newest(tmp_path) == "step-00000001"
    assert checkpoint_folder.newest_whole(tmp_path).name == "step-00000001"


def newest_of_each(rank: int, run_dirs: list[Path]) -> list[str]:
    return [checkpoint.find_newest_whole(run_dir, World(rank=rank, size=2)).name for run_dir in run_dirs]


def test_two_ranks_that_share_the_files_both_hear_of_a_flipped_bit_in_any(tmp_path):
    save(tmp_path / "whole", 1, 2)
    files = [path.name for path in (tmp_path / "whole" / "checkpoints" / "step-00000002").iterdir()]
    for file in files:
        shutil.copytree(tmp_path / "whole", tmp_path / file)
        path = tmp_path / file / "checkpoints" / "step-00000002" / file
        path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    found = run_on_ranks(newest_of_each, 2, [tmp_path / name for name in ("whole", *files)])
    assert found == [["step-00000002", *["step-00000001"] * 5]] * 2


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(tmp_path, caplog):
    save(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / "checkpoints" / f"step-0000000{step}" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole on every rank"):
        newest(tmp_path)
    assert [line.split(" is not whole")[0][-1] for line in caplog.messages] == ["2", "1"]


def test_damaged_newer_ones_do_not_outlive_the_checkpoints_of_the_run_that_goes_on(tmp_path):
    save(tmp_path, 3, 4, 5)
    for step in (4, 5):
        (tmp_path / "checkpoints" / f"step-0000000{step}" / "model.safetensors").write_bytes(b"")
    checkpoint.set_aside_newer(checkpoint.find_newest_whole(tmp_path, World()))
    assert (tmp_path / "checkpoints" / ".step-00000005.damaged" / "optimizer.safetensors").is_file()
    save(tmp_path, 4, keep_last=1)
    assert newest(tmp_path) == "step-00000004"


def test_a_partial_checkpoint_is_invisible_and_the_next_run_clears_it(tmp_path):
    folder = tmp_path / "checkpoints"
    for left in (".step-00000003.partial", ".step-00000002.partial", ".step-00000004.damaged"):
        (folder / left).mkdir(parents=True)
        (folder / left / "half").write_bytes(b"half")
    assert newest(tmp_path) is None
    assert not checkpoint_folder.has_checkpoints(tmp_path)
    save(tmp_path, 3)
    assert newest(tmp_path) == "step-00000003"
    assert sorted(path.name for path in folder.glob("*step-*")) == [".step-00000004.damaged", "step-00000003"]
    assert not (folder / "step-00000003" / "half").exists()


def test_the_last_ones_are_kept_and_the_pointer_names_the_newest(tmp_path):
    save(tmp_path, 1, 2, 3, 30, keep_last=2)
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-00000003", "step-00000030"]
    assert (folder / "latest").read_text() == "step-00000030"


def test_weights_are_read_from_run_checkpoint_and_file(tmp_path):
    model = save(tmp_path, 1, 2)
    folder = tmp_path / "checkpoints" / "step-00000002"
    for source in (tmp_path, folder, folder / "model.safetensors"):
        found = weights.read_weights(str(source))
        assert torch.equal(found["weight"], model.weight)
    other = nn.Linear(3, 2)
    weights.load_model(other, str(tmp_path))
    assert torch.equal(other.bias, model.bias)


def test_weights_that_do_not_fit_or_are_not_there_are_one_line(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "broken.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="of another model"):
        weights.load_model(nn.Linear(4, 2), str(tmp_path))
    with pytest.raises(UserError, match="has no audio tower"):
        weights.load_tower(nn.Linear(3, 2), "audio", str(tmp_path))
    with pytest.raises(UserError, match="no weights at"):
        weights.read_weights(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no safetensors file"):
        weights.read_weights(str(tmp_path / "broken.safetensors"))


@pytest.mark.parametrize("key", ["seed", "global_batch_size", "steps_an_epoch", "optimizer"])
def test_a_run_with_other_batches_cannot_go_on(key):
    other = dataclasses.replace(START, **{key: 3})
    with pytest.raises(UserError, match="give the same, or a new run_dir"):
        START.check_fits(other, "step-1")
    START.check_fits(dataclasses.replace(START, step=9, world_size=3), "step-1")


def test_a_run_goes_on_with_its_clips_in_the_same_order_or_not_at_all(tmp_path):
    """Epochs of as many batches throughout: only their order differs."""
    shards = write_training_set(tmp_path / "set")
    shutil.copytree(shards, tmp_path / "copy")
    write_shards(tmp_path / "other", [[make_sample(12 * shard + row) for row in range(12)] for shard in (0, 1, 3, 2)])

    def start(*words, shards=shards):
        data = [f"run_dir={tmp_path / 'run'}", f"data.train.own.shards={shards}"]
        return prepare(read_recipe([*SMALL, *data, *words]), World()).start()

    before = start()
    before.check_fits(start(shards=tmp_path / "copy"), "step-1")
    for now, what in (
        (start("data.num_lanes=12"), r"data\.num_lanes 6, not 12"),
        (start("data.window_shards=1"), r"data\.window_shards 4, not 1"),
        (start("data.train.own.weight=1.01"), r"weights of data\.train \(1\.0,\), not \(1\.01,\)"),
        (start(shards=tmp_path / "other"), r"shards of data\.train \(digest of their contents\) \w{16}, not \w{16}"),
    ):
        assert now.steps_an_epoch == before.steps_an_epoch
        with pytest.raises(UserError, match=rf"^step-1 was made with {what}: give the same, or a new run_dir$"):
            before.check_fits(now, "step-1")


def test_an_older_checkpoint_that_tells_nothing_of_order_and_sick_steps_in_a_row_is_taken(tmp_path):
    model = save(tmp_path, 3)
    saved = tmp_path / "checkpoints" / "step-00000003"
    assert checkpoint.read_progress(saved) == dataclasses.replace(START, step=3)
    told = json.loads((saved / "progress.json").read_text())
    del told["order"], told["health"]["num_skipped_in_a_row"]
    (saved / "progress.json").write_text(json.dumps(told))
    # From here on its run tells it.
    assert checkpoint.load(StateEngine(), model, saved, START).order == START.order
