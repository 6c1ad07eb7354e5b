"""Checkpoints are complete or invisible: what damage does, what is kept, what may go on from them."""

import dataclasses

import pytest
import torch
from torch import nn

from audiotext_dist.distributed import World
from audiotext_dist.errors import UserError
from audiotext_dist.training import checkpoint, checkpoint_folder, weights
from audiotext_dist.training.checkpoint import Progress
from audiotext_dist.training.saving import CheckpointConfig, Saver

START = Progress(
    step=0,
    epoch=0,
    batch=0,
    seed=1,
    global_batch_size=8,
    steps_an_epoch=4,
    world_size=1,
    optimizer="adamw",
)


class StateEngine:
    """Stands for the engine, whose real state tests/training/test_resume.py goes through."""

    ema = None

    def optimizer_state(self, *, on_this_rank):
        return {"weight:exp_avg": torch.ones(2, 3)} if on_this_rank else {}


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


def test_a_partial_checkpoint_is_invisible_and_the_next_save_clears_it(tmp_path):
    partial = tmp_path / "checkpoints" / ".step-00000003.partial"
    partial.mkdir(parents=True)
    (partial / "half").write_bytes(b"half")
    assert newest(tmp_path) is None
    assert not checkpoint_folder.has_checkpoints(tmp_path)
    save(tmp_path, 3)
    assert newest(tmp_path) == "step-00000003"
    assert not partial.exists()
    assert not (tmp_path / "checkpoints" / "step-00000003" / "half").exists()


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
