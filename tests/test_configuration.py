"""Every wrong word on a command line is one line that names the key and the mend."""

from pathlib import Path

import pytest

from audiotext_dist import configuration
from audiotext_dist.errors import UserError
from audiotext_dist.training.recipe import Recipe, read_recipe

RECIPES = sorted((Path(__file__).parents[1] / "launch" / "recipes").rglob("*.yaml"))
RECIPES = [file for file in RECIPES if file.parent.name != "parts"]  # of which recipes are made
ENOUGH = ["name=test", "data.train.own.shards=shards"]
FRAMES = [*ENOUGH, "task=audio-image"]


@pytest.mark.parametrize(
    "key",
    [
        "data.train.own.shards",
        "data.validation.own.relevance",
        "data.validation.own.features",
        "data.teachers.clap",
        "model.audio.pretrained",
        "model.image.init",
        "model.text.pretrained",
        "engine.deepspeed_config",
        "tracker.project",
    ],
)
@pytest.mark.parametrize("url", ["s3://key:SECRET@host/a", "https://host/a?X-Signature=SECRET"])
def test_no_url_of_a_recipe_holds_a_secret(key: str, url: str) -> None:
    words = [*ENOUGH, "data.validation.own.shards=shards", f"{key}={url}"]
    with pytest.raises(UserError, match=rf"{key}=(s3|https)://host/a is given with credentials.* environment") as met:
        read_recipe(words)
    assert "SECRET" not in str(met.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*ENOUGH, "optim.wieght_lr=1"], r"unknown key 'optim.wieght_lr'.*did you mean 'optim.weight_lr'\?"),
        ([*ENOUGH, "data.train.own.wieght=2"], r"did you mean 'data.train.own.weight'\?"),
        ([*ENOUGH, "trainig.num_epochs=2"], r"unknown key 'trainig'.*did you mean 'training'\?"),
        ([*ENOUGH, "training.num_epochs=many"], r"wrong value for 'training.num_epochs'.*'many'"),
        ([*ENOUGH, "task=audio-video"], r"wrong value for 'task'.*audio-image"),
        ([*ENOUGH, "training.num_epochs=0"], r"training.num_epochs=0 must be above 0"),
        ([*ENOUGH, "evaluation.every_epochs=0"], r"evaluation.every_epochs=0 must be above 0"),
        ([*ENOUGH, "data.num_lanes=-1"], r"data.num_lanes=-1 must be above 0"),
        ([*ENOUGH, "data.train.own.weight=0"], r"data set 'own' has weight 0.0: give one above 0"),
        (
            [*ENOUGH, "data.validation.held.shards=a", "data.validation.held.weight=3"],
            r"data.validation.held.weight=3 says nothing to evaluation",
        ),
        ([*ENOUGH, "data.train.own.relevance=labels"], r"data.train.own.relevance says nothing to training"),
        ([*ENOUGH, "data.train.own.benchmark=clotho-evaluation"], r"data.train.own.benchmark says nothing to training"),
        ([*ENOUGH, "data.clip_seconds=.nan"], r"data.clip_seconds=nan must be above 0"),
        ([*ENOUGH, "data.clip_seconds=30"], r"30 is more than the 10 s that the audio tower reads"),
        ([*ENOUGH, "optim.betas=[2,3]"], r"must lie in \[0, 1\)"),
        ([*ENOUGH, "optim.warmup_epochs=11"], r"longer than training.num_epochs"),
        ([*ENOUGH, "training.seed=-1"], r"training.seed=-1 must not be negative"),
        ([*ENOUGH, "model.max_logit_scale=0"], r"model.max_logit_scale=0.0 must be above 0"),
        ([*ENOUGH, "loss.pair_weight=0"], r"the loss has no term: set loss.pair_weight"),
        ([*ENOUGH, "loss.recording_weight=-1"], r"loss.recording_weight=-1.0 must be 0 or more"),
        (
            [*ENOUGH, "training.skip_spikes=true", "training.spike_ratio=null"],
            r"training.skip_spikes=true says nothing with training.spike_ratio=null",
        ),
        ([*ENOUGH, "loss.tile_bytes=0"], r"loss.tile_bytes=0 must be above 0"),
        ([*ENOUGH, "loss.direction=forth"], r"wrong value for 'loss.direction'.*first_to_second"),
        ([*ENOUGH, "loss.teacher_weight=1"], r"loss.teacher_weight=1 needs teachers: embed the training sets"),
        ([*ENOUGH, "loss.name=sigmoid"], r"needs a bias: set model.init_logit_bias=-10"),
        ([*ENOUGH, "model.init_logit_bias=-10"], r"model.init_logit_bias=-10 changes no softmax"),
        ([*ENOUGH, "loss.name=sigmoid", "loss.teacher_weight=1"], r"takes no softmaxed targets"),
        ([*ENOUGH, "loss.name=sigmoid", "loss.direction=first_to_second"], r"loss.name=sigmoid has no directions"),
        (
            [*ENOUGH, "loss.name=sigmoid", "loss.recording_weight=1", "loss.recording_form=mean_a_row"],
            r"no loss.recording_form=mean_a_row: set mean_over_pairs or left_out",
        ),
        (
            [*ENOUGH, "loss.frame_match=nearest"],
            r"loss.frame_match=nearest matches sound to frames, not task=audio-text",
        ),
        ([*ENOUGH, "loss.frame_match_from_epoch=-1"], r"loss.frame_match_from_epoch=-1 must not be negative"),
        ([*FRAMES, "loss.frame_match_from_epoch=5"], r"loss.frame_match=one is the same in every epoch"),
        (
            [*FRAMES, "loss.frame_match=nearest", "loss.frame_match_from_epoch=10"],
            r"loss.frame_match_from_epoch=10 never comes in training.num_epochs=10",
        ),
        (
            [*FRAMES, "loss.frame_match=multiframe"],
            r"model.audio.num_outputs=1 and data.num_frames=4: set the first to 4",
        ),
        ([*FRAMES, "model.audio.num_outputs=4"], r"num_outputs=4 goes with loss.frame_match=multiframe, not one"),
        ([*FRAMES, "model.audio.num_outputs=0"], r"model.audio.num_outputs=0 must be above 0"),
        ([*ENOUGH, "evaluation.frame=best"], r"evaluation.frame=best chooses among frames .* task=audio-text"),
        (
            [*FRAMES, "loss.frame_match=multiframe", "model.audio.num_outputs=4", "evaluation.frame=best"],
            r"with model.audio.num_outputs=4 does not: set it to middle",
        ),
        ([*ENOUGH, "training.micro_batch_size=0"], r"training.micro_batch_size=0 must be above 0"),
        ([*ENOUGH, "training.precision=fp8"], r"wrong value for 'training.precision'.*bf16"),
        ([*ENOUGH, "engine.zero_stage=3"], r"engine.zero_stage=3 is not supported, .*: choose 2"),
        ([*ENOUGH, "data.train.own.weight=0"], r"data set 'own' has weight 0"),
        ([*ENOUGH, "--epochs"], r"cannot read '--epochs': options are written key=value"),
        ([*ENOUGH, "data.train=[1,"], r"cannot read the value of 'data.train=\[1,'"),
        ([*ENOUGH, "model.audio=3"], r"wrong value: .*AudioTowerConfig"),
        (["name=test"], r"no training data: give data.train.NAME.shards=FOLDER"),
        (["name=test", "data.train.own.weight=1"], r"'data.train.own.shards' has no value"),
        (["data.train.own.shards=shards"], r"'name' has no value: give name="),
        (["recipe=nowhere.yaml"], r"no recipe file at nowhere.yaml"),
        (["recipe=a.yaml", "recipe=b.yaml"], r"recipe= is given 2 times"),
    ],
)
def test_wrong_words(words, message):
    with pytest.raises(UserError, match=message) as caught:
        read_recipe(words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name: [a\n", r"is not YAML"),
        ("- name\n", r"holds no 'key: value' mapping"),
        ("name: test\nmodle: {}\n", r"unknown key 'modle' in .*: did you mean 'model'\?"),
        ("\xff\xfe".encode("latin-1"), r"is not YAML"),
    ],
)
def test_wrong_files(tmp_path, content, message):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        read_recipe([f"recipe={file}"])
    assert "\n" not in str(caught.value)


def test_a_file_changes_its_base_which_lies_relative_to_it(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "root.yaml").write_text("name: root\noptim: {weight_lr: 0.5, momentum: 0.5}\ndata: {num_frames: 3}\n")
    (tmp_path / "middle.yaml").write_text("base: root.yaml\nname: middle\noptim: {momentum: 0.6}\n")
    (tmp_path / "rows" / "row.yaml").write_text("base: ../middle.yaml\ndata: {train: {own: {shards: here}}}\n")
    recipe = read_recipe([f"recipe={tmp_path / 'rows' / 'row.yaml'}", "optim.momentum=0.7"])
    assert (recipe.name, recipe.optim.weight_lr, recipe.optim.momentum) == ("middle", 0.5, 0.7)
    assert (recipe.data.num_frames, recipe.data.train["own"].shards) == (3, "here")


def test_of_several_bases_later_ones_win(tmp_path):
    (tmp_path / "stage.yaml").write_text("name: stage\noptim: {weight_lr: 0.5, momentum: 0.5}\n")
    (tmp_path / "tower.yaml").write_text("name: tower\noptim: {momentum: 0.6}\n")
    (tmp_path / "row.yaml").write_text("base: [stage.yaml, tower.yaml]\ndata: {train: {own: {shards: here}}}\n")
    recipe = read_recipe([f"recipe={tmp_path / 'row.yaml'}"])
    assert (recipe.name, recipe.optim.weight_lr, recipe.optim.momentum) == ("tower", 0.5, 0.6)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("nowhere.yaml", r"no base file at .*nowhere.yaml: mend base=nowhere.yaml in .*recipe.yaml"),
        ("recipe.yaml", r"base=recipe.yaml in .* leads back to itself"),
        ("between.yaml", r"base=recipe.yaml in .*between.yaml leads back to itself"),
        ("[[recipe.yaml]]", r"is no file's name: give a path relative to that file"),
    ],
)
def test_wrong_bases(tmp_path, base, message):
    (tmp_path / "between.yaml").write_text("base: recipe.yaml\n")
    (tmp_path / "recipe.yaml").write_text(f"base: {base}\nname: test\n")
    with pytest.raises(UserError, match=message):
        read_recipe([f"recipe={tmp_path / 'recipe.yaml'}"])


def test_words_win_over_the_file_and_the_launchers_word_is_passed_over(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("name: filed\ntraining: {num_epochs: 7, seed: 3}\ndata: {train: {own: {shards: here}}}\n")
    recipe = read_recipe(["--local_rank=1", f"recipe={file}", "training.num_epochs=2", "optim.betas=[0.5,0.6]"])
    assert (recipe.name, recipe.training.num_epochs, recipe.training.seed) == ("filed", 2, 3)
    assert recipe.run_dir == "runs/filed"
    assert recipe.optim.betas == (0.5, 0.6)


def test_a_whole_mapping_replaces_the_files_and_a_deeper_key_joins_it(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("name: filed\ndata: {train: {own: {shards: here}}}\n")
    replaced = read_recipe([f"recipe={file}", "data.train={mine: {shards: there}}", "data.train.mine.weight=2"])
    joined = read_recipe([f"recipe={file}", "data.train.mine.shards=there"])
    assert {name: (chosen.shards, chosen.weight) for name, chosen in replaced.data.train.items()} == {
        "mine": ("there", 2.0)
    }
    assert set(joined.data.train) == {"own", "mine"}


def test_a_resolved_recipe_reads_back_as_itself(tmp_path):
    recipe = read_recipe([*ENOUGH, "data.train.more.shards=b", "data.train.more.weight=2.5", "training.resume=auto"])
    file = tmp_path / "resolved.yaml"
    file.write_text(configuration.to_yaml(recipe))
    assert read_recipe([f"recipe={file}"]) == recipe


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_in_the_repository_is_valid(file):
    assert read_recipe([f"recipe={file}", "data.train.any.shards=shards"]).name


def test_help_names_every_key():
    text = configuration.describe(Recipe)
    for key in ("optim.weight_lr=0.001", "data.train.NAME.weight=1.0", "model.audio.fbank.mean=", "name=(required)"):
        assert key in text


def test_a_batch_that_the_processes_cannot_share_names_one_that_they_can():
    recipe = read_recipe([*ENOUGH, "training.global_batch_size=64"])
    with pytest.raises(UserError, match="64 cannot be shared by 3 processes: set it to 63"):
        recipe.check_world(3)


def test_micro_batches_share_each_process_evenly():
    recipe = read_recipe([*ENOUGH, "training.global_batch_size=48", "training.micro_batch_size=10"])
    with pytest.raises(
        UserError, match=r"micro_batch_size=10 does not divide the 24 clips of each process: set it to 8"
    ):
        recipe.check_world(2)
    recipe.check_world(6)
    assert recipe.num_micro_batches(6) == 1
    fitting = read_recipe([*ENOUGH, "training.global_batch_size=48", "training.micro_batch_size=8"])
    fitting.check_world(2)
    assert fitting.num_micro_batches(2) == 3
