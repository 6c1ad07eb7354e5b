"""The recipes of the papers say what the papers say."""

from pathlib import Path

import pytest

from audiotext_dist.training.recipe import read_recipe

RECIPES = Path(__file__).parents[1] / "launch" / "recipes"


@pytest.mark.parametrize("tower", ["passt", "mn10", "atst"])
@pytest.mark.parametrize("data", ["clotho", "all"])
def test_stages_of_correspondences_hang_together(data, tower):
    first, alone, ensemble = (
        read_recipe([f"recipe={RECIPES / 'correspondences' / data / f'{tower}_{stage}.yaml'}"])
        for stage in ("stage1", "self", "ensemble")
    )
    best = f"{first.run_dir}/checkpoints/best"
    assert {recipe.model.init for recipe in (alone, ensemble)} == {best}
    assert alone.data.teachers == {f"{data}-{tower}": best}
    assert len(ensemble.data.teachers) == 3
    assert ensemble.data.teachers.items() >= alone.data.teachers.items()
    for second in (alone, ensemble):
        # ClothoV2 alone, whatever stage 1 has seen, and the same towers and steps.
        assert list(second.data.train) == ["clotho"]
        assert (second.model.audio, second.model.text, second.optim) == (
            first.model.audio,
            first.model.text,
            first.optim,
        )
        assert (second.loss.recording_weight, second.loss.teacher_weight) == (0, 1)
    assert (first.loss.pair_weight, first.loss.recording_weight, first.loss.teacher_weight) == (0, 1, 0)
    assert len(first.data.train) == {"clotho": 1, "all": 6}[data]
    assert first.optim.weight_lr * first.optim.final_lr_share == pytest.approx(1e-7)
