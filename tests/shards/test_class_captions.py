"""Captions made of classes: several wordings, the same again on the next call, built into shards."""

import json
import re

import pytest

from audiotext_dist.configuration import parse
from audiotext_dist.errors import UserError
from shards.class_captions import ClassCaptionsConfig, class_captions
from shards.sources.table import TableConfig, records


def config(folder, **changes):
    given = {"table": str(folder / "list.csv"), "class_column": "class", "name_column": "file"}
    return ClassCaptionsConfig(**{**given, "out": str(folder / "clips.jsonl"), **changes})


@pytest.fixture
def folder(tmp_path):
    rows = [f"{number}.wav,{'dog_bark' if number % 2 else 'siren'}" for number in range(40)]
    (tmp_path / "list.csv").write_text("\n".join(["file,class", *rows]))
    return tmp_path


def test_each_clip_gets_its_own_wordings_of_its_class(folder):
    assert class_captions(config(folder)) == 40
    first = (folder / "clips.jsonl").read_bytes()
    class_captions(config(folder, file_pattern="fold/{file}"))
    built = list(records(TableConfig(table=str(folder / "clips.jsonl"), dataset="x", caption_columns=["captions"])))
    assert built[3].media == str(folder / "fold" / "3.wav")
    class_captions(config(folder))
    assert (folder / "clips.jsonl").read_bytes() == first
    built = list(records(TableConfig(table=str(folder / "clips.jsonl"), dataset="x", caption_columns=["captions"])))
    for record in built:
        thing = "dog bark" if int(record.name.split(".")[0]) % 2 else "siren"
        assert len(set(record.captions)) == 3
        assert all(thing in caption.lower() and caption[0].isupper() for caption in record.captions)
    assert len({caption for record in built for caption in record.captions}) == 20
    assert json.loads(first.splitlines()[0])["class"] == "siren"


def test_a_renamed_class_has_its_new_name_in_captions_and_labels(folder):
    words = [f"table={folder}/list.csv", "class_column=class", "name_column=file", f"out={folder}/x.jsonl"]
    class_captions(parse(ClassCaptionsConfig, [*words, "rename={dog_bark: dog}"]))
    table = TableConfig(table=str(folder / "x.jsonl"), dataset="x", caption_columns=["captions"], label_column="class")
    built = list(records(table))
    assert {label for record in built for label in record.labels} == {"dog", "siren"}
    dogs = [caption.lower() for record in built if record.labels == ["dog"] for caption in record.captions]
    assert len(dogs) == 60
    assert all("dog" in caption and "bark" not in caption for caption in dogs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_column": "kind"}, "line 2 has nothing in column 'kind': its columns are file, class"),
        ({"file_pattern": "{fold}/{file}"}, "file_pattern={fold}/{file} asks for 'fold': its columns are file, class"),
        ({"num_captions": 11}, "num_captions=11: give a number from 1 to 10"),
        ({"rename": {"dog_bark": "dog", "dog bark": "dog"}}, "list.csv is of class 'dog bark': mend rename="),
        ({"out": "clips.csv"}, "give a name that ends with .jsonl"),
    ],
)
def test_wrong_words_are_one_line(folder, changes, message):
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        class_captions(config(folder, **changes))
    assert "\n" not in str(raised.value)
