"""The recipes of the papers say what the papers say."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from audiotext_dist.evaluation.checks import check_metric
from audiotext_dist.training.recipe import read_recipe

RECIPES = Path(__file__).parents[1] / "launch" / "recipes"


def test_every_recipe_can_be_read_and_has_a_run_folder_and_a_best_metric_of_its_own():
    files = [file for file in RECIPES.rglob("*.yaml") if file.parent.name != "parts"]
    recipes = [read_recipe([f"recipe={file}"]) for file in files if not file.name.startswith("base_")]
    assert len({recipe.run_dir for recipe in recipes}) == len(recipes) > 50
    for recipe in recipes:
        if recipe.checkpoint.best_metric is not None:
            check_metric(recipe.checkpoint.best_metric, recipe.task, recipe.data.validation)


CORRESPONDENCES = [
    f"{file.parent.name}/{file.name.removesuffix('_stage1.yaml')}"
    for file in sorted((RECIPES / "correspondences").glob("*/*_stage1.yaml"))
]


@pytest.mark.parametrize("name", CORRESPONDENCES)
def test_stages_of_correspondences_hang_together(name):
    data, tower = name.split("/")
    stages = {
        stage: read_recipe([f"recipe={file}"])
        for stage in ("stage1", "self", "ensemble")
        if (file := RECIPES / "correspondences" / f"{name}_{stage}.yaml").exists()
    }
    assert stages.keys() - {"ensemble"} == {"stage1", "self"}
    assert "ensemble" in stages or tower == "passt_bert"
    first = stages.pop("stage1")
    best = f"{first.run_dir}/checkpoints/best"
    teacher = tower.replace("_", "-") if data == "soundscape" else f"{data}-{tower.replace('_', '-')}"
    for stage, second in stages.items():
        assert second.model.init == second.data.teachers[teacher] == best
        assert len(second.data.teachers) == {"self": 1, "ensemble": 3}[stage]
        # ClothoV2 alone, whatever stage 1 has seen, and the same towers.
        assert list(second.data.train) == ["soundscape" if data == "soundscape" else "clotho"]
        assert (second.model.audio, second.model.text) == (first.model.audio, first.model.text)
        # The steps are those of stage 1, but for small towers that stage 1 trains from nothing.
        rate = 0.5 if data == "soundscape" else 1
        assert second.optim == replace(first.optim, weight_lr=rate * first.optim.weight_lr)
        assert (second.loss.pair_weight, second.loss.recording_weight, second.loss.teacher_weight) == (0, 0, 1)
    assert (first.loss.pair_weight, first.loss.recording_weight, first.loss.teacher_weight) == (0, 1, 0)
    assert len(first.data.train) == {"clotho": 1, "all": 6, "soundscape": 1}[data]
    if data != "soundscape":
        assert first.optim.weight_lr * first.optim.final_lr_share == pytest.approx(1e-7)


@pytest.mark.parametrize(
    ("row", "match", "from_epoch"),
    [
        ("conventional", "one", 0),
        ("nearest_n00", "nearest", 0),
        ("nearest_n05", "nearest", 5),
        ("nearest_n10", "nearest", 10),
        ("nearest_n15", "nearest", 15),
        ("multiframe", "multiframe", 0),
    ],
)
def test_rows_of_temporal_agreement_are_those_of_its_table_1(row, match, from_epoch):
    image, text = (
        read_recipe([f"recipe={RECIPES / 'temporal_agreement' / f'{row}_audio_{other}.yaml'}"])
        for other in ("image", "text")
    )
    assert (image.loss.frame_match, image.loss.frame_match_from_epoch) == (match, from_epoch)
    assert text.model.audio.init == image.run_dir
    assert (image.optim.weight_lr, image.optim.bias_lr, text.optim.weight_lr, text.optim.bias_lr) == (
        *(0.2, 0.0048),
        *(1.0, 0.024),
    )
    assert (image.training.num_epochs, image.training.global_batch_size) == (30, 128)
    assert (text.training.num_epochs, text.training.global_batch_size) == (20, 64)
    for recipe in (image, text):
        assert (recipe.optim.name, recipe.optim.weight_decay, recipe.optim.warmup_epochs) == ("lars", 1e-6, 10)
        # The paper's loss is the sum of both directions, ours their mean.
        assert (recipe.loss.pair_weight, recipe.loss.direction) == (2, "both")
        # VIP-ANT's.
        assert (recipe.optim.momentum, recipe.optim.trust_coefficient, recipe.optim.final_lr_share) == (0.9, 1e-3, 1e-3)
        assert recipe.model.init_temperature == 0.07
        audio, fbank = recipe.model.audio, recipe.model.audio.fbank
        assert (audio.stride_frames, audio.stride_bins, fbank.num_fbank_frames, fbank.num_mel_bins) == (
            16,
            24,
            1000,
            128,
        )
        assert (fbank.mean, fbank.std, fbank.freq_mask_bins, fbank.time_mask_frames) == (
            -4.93839311,
            5.75751113,
            32,
            200,
        )
    assert (image.data.num_frames, image.data.clip_seconds) == (4, 10)
    assert (image.model.audio.init_from_image, image.model.audio.num_outputs) == (True, 4 if row == "multiframe" else 1)
    assert (image.model.image.name, image.model.image.pretrained) == ("ViT-B-32-quickgelu", "openai")
    assert (text.model.text.name, text.model.text.pretrained) == ("ViT-B-32-quickgelu", "openai")
    assert image.model.image.frozen
    assert text.model.text.frozen


def test_a_recipe_is_read_without_the_libraries_that_take_seconds_to_import():
    slow = {"deepspeed", "open_clip", "timm", "torchvision", "transformers", "wandb"}
    code = f"""
import sys
from audiotext_dist.evaluation.checks import check_metric
from audiotext_dist.training.recipe import read_recipe
import launch.pretrain
read_recipe(["recipe=launch/recipes/examples/av_overfit.yaml"])
print(*sorted({slow} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
