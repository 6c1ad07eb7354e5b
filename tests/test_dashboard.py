"""The workspace's definition, against the schema of W&B's own package."""

import sys

import pytest

from audiotext_dist.errors import UserError
from audiotext_dist.training.recipe import read_recipe
from launch import dashboard

WORDS = [
    "name=test",
    "data.train.own.shards=/x",
    "data.validation={one: {shards: /x}, two: {shards: /y, relevance: labels}}",
]


def test_every_panel_of_the_definition_is_one_to_wandb():
    workspaces = pytest.importorskip("wandb_workspaces.workspaces")
    recipe = read_recipe(WORDS)
    made = dashboard.workspace(recipe, "someone", "somewhere")
    # As it would be sent, and as it would come back.
    spec = made._to_model()
    sent = spec.model_dump(by_alias=True, exclude_none=True)
    (view,) = [sent["spec"]]
    sections = view["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == ["loss", "retrieval", "optimisation", "data", "system"]
    again = workspaces.Workspace._from_model(type(spec).model_validate(sent))
    for section, (name, panels) in zip(again.sections, dashboard.described(recipe).items(), strict=True):
        assert (section.name, len(section.panels)) == (name, len(panels))
        for panel, described in zip(section.panels, panels, strict=True):
            if described["y"]:
                assert [str(getattr(line, "name", line)) for line in panel.y] == described["y"]
                assert panel.title == described["title"]


def test_sets_and_directions_are_those_of_the_run():
    panels = dashboard.described(read_recipe([*WORDS, "task=audio-image"]))["retrieval"]
    assert [panel["title"] for panel in panels if "R@10" in panel["title"]] == ["one: R@10", "two: R@10"]
    assert panels[0]["y"] == ["validation/one/audio->image/R@1", "validation/one/image->audio/R@1"]
    own = ["validation/two/audio->image/R@1", "validation/two/image->audio/R@1"]
    labels = ["validation/two/audio->image (labels)/R@1", "validation/two/image->audio (labels)/R@1"]
    assert panels[1]["y"] == [*own, *labels]
    assert {panel.get("table") for panel in panels} == {None, "examples/one/queries", "examples/two/queries"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["entity=x"], "give run=FOLDER"),
        (["run=/nowhere", "entiyt=x"], "unknown word 'entiyt'"),
        (["run=/nowhere"], "/nowhere is no run folder"),
    ],
)
def test_wrong_words_are_one_line(monkeypatch, words, message):
    monkeypatch.setattr(sys, "argv", ["dashboard.py", *words])
    with pytest.raises(UserError, match=message):
        dashboard.main()
