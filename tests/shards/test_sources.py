from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from audiotext_dist.errors import UserError
from shards.sources import audioset, table
from shards.sources.audioset import AudioSetConfig
from shards.sources.table import TableConfig

REAL_DATA = Path(__file__).parents[3] / "shared" / "data"


def table_config(path: Path, **options: object) -> TableConfig:
    return TableConfig(table=str(path), dataset="d", **options)  # type: ignore[arg-type]


def refusal(config: TableConfig) -> str:
    with pytest.raises(UserError) as caught:
        list(table.records(config))
    assert "\n" not in str(caught.value)
    return str(caught.value)


CSV_ROWS = 'file,caption,from,to\n-a.wav,"a, ""b"", ü",1.5,2\nb c.wav,plain,,\n'


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_csv_and_tsv_in_their_usual_forms(tmp_path: Path, suffix: str, newline: str, bom: str) -> None:
    path = tmp_path / f"list.{suffix}"
    text = CSV_ROWS if suffix == "csv" else CSV_ROWS.replace(", ", "; ").replace(",", "\t").replace("; ", ", ")
    path.write_bytes((bom + text.replace("\n", newline)).encode())
    first, second = table.records(table_config(path, start_column="from", end_column="to"))
    assert (first.name, first.media, first.recording) == ("-a.wav", str(tmp_path / "-a.wav"), "d:-a.wav")
    assert first.captions == ['a, "b", ü']
    assert (first.start_seconds, first.end_seconds) == (1.5, 2.0)
    assert (second.name, second.captions) == ("b c.wav", ["plain"])
    assert (second.start_seconds, second.end_seconds) == (None, None)


def test_every_form_of_list_says_the_same(tmp_path: Path) -> None:
    rows = [{"file": f"{n}.wav", "id": f"clip {n}", "texts": ["one", "two"], "label": "dog"} for n in range(3)]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "list.parquet")
    lines = [f'{row["file"]}\t{row["id"]}\t["one", "two"]\t{row["label"]}' for row in rows]
    (tmp_path / "list.tsv").write_text("\n".join(["file\tid\ttexts\tlabel", *lines]))
    (tmp_path / "list.csv").write_text(
        "\n".join(["file,id,texts,label", *(f'{n}.wav,clip {n},"[""one"",""two""]",dog' for n in range(3))])
    )
    options = {"name_column": "id", "caption_columns": ["texts"], "label_column": "label"}
    found = [
        list(table.records(table_config(tmp_path / f"list.{suffix}", **options)))
        for suffix in ("csv", "tsv", "jsonl", "parquet")
    ]
    assert found[0] == found[1] == found[2] == found[3]
    assert (found[0][1].captions, found[0][1].labels, found[0][1].name) == (["one", "two"], ["dog"], "clip 1")


def test_several_caption_columns_and_empty_captions(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text("file,caption_1,caption_2\na,x,y\nb, ,z\nc,[laughter] x,\n")
    records = table.records(table_config(path, caption_columns=["caption_1", "caption_2"]))
    assert [record.captions for record in records] == [["x", "y"], ["z"], ["[laughter] x"]]


def test_media_is_looked_for_in_its_folder_and_may_have_no_name(tmp_path: Path) -> None:
    (tmp_path / "sounds").mkdir()
    path = tmp_path / "list.jsonl"
    path.write_text('{"file": "s/a.wav", "caption": "x", "id": 7}\n{"file": null, "caption": null, "id": 8}\n')
    first, second = table.records(table_config(path, media=str(tmp_path / "sounds"), name_column="id"))
    assert (first.media, first.name) == (str(tmp_path / "sounds/s/a.wav"), "7")
    assert (second.media, second.captions) == (None, [])


@pytest.mark.parametrize("name", ["../secret.wav", "s/../../secret.wav", "/etc/hostname", "..", "../sounds2/a.wav"])
def test_no_row_leads_out_of_the_media_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "sounds").mkdir()
    (tmp_path / "list.jsonl").write_text(json.dumps({"file": name, "caption": "x"}))
    config = table_config(tmp_path / "list.jsonl", media=str(tmp_path / "sounds"))
    assert f"list.jsonl line 1: '{name}' is not in {tmp_path}/sounds" in refusal(config)
    (record,) = table.records(replace(config, media="/"))
    assert record.name == name


def test_a_list_named_from_the_folder_it_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "list.csv").write_text("file,caption\na.wav,x\n")
    monkeypatch.chdir(tmp_path)
    for options in ({}, {"media": "."}, {"media": f"../{tmp_path.name}"}):
        (record,) = table.records(table_config(Path("list.csv"), **options))
        assert record.media == f"{tmp_path}/a.wav"


def test_an_absolute_path_and_a_detour_inside_the_folder_are_taken(tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text(
        "\n".join(json.dumps({"file": name, "caption": "x"}) for name in (f"{tmp_path}/a.wav", "s/../a.wav"))
    )
    assert [record.media for record in table.records(table_config(tmp_path / "list.jsonl"))] == [
        f"{tmp_path}/a.wav"
    ] * 2


def test_the_recording_is_what_the_pattern_finds(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text("file,caption\n1-103298-A-9,x\nesc10-rooster-5-233160-A,y\n")
    config = table_config(path, recording_pattern=r"\d+-(\d+)-", recording_prefix="freesound")
    assert [record.recording for record in table.records(config)] == ["freesound:103298", "freesound:233160"]
    assert "finds nothing in '1-103298-A-9'" in refusal(table_config(path, recording_pattern="x(y)"))


@given(share=st.floats(0, 1), seed=st.integers(0, 5))
def test_the_two_parts_share_no_recording_and_lose_no_row(
    tmp_path_factory: pytest.TempPathFactory, share: float, seed: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "split.csv"
    if not path.exists():
        path.write_text("file,caption\n" + "".join(f"{n}-{n // 3}-,x\n" for n in range(60)))
    config = table_config(path, recording_pattern=r"-(\d+)-", held_out_share=share, split_seed=seed)
    everything, train, held_out = (
        list(table.records(replace(config, split=split)))  # type: ignore[arg-type]
        for split in ("all", "train", "held_out")
    )
    assert {record.recording for record in train} & {record.recording for record in held_out} == set()
    assert sorted(record.name for record in train + held_out) == sorted(record.name for record in everything)


def test_the_split_has_its_share_and_its_seed(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text("file,caption\n" + "".join(f"{n},x\n" for n in range(2000)))
    parts = [
        {record.name for record in table.records(table_config(path, split="held_out", split_seed=seed))}
        for seed in (0, 0, 1)
    ]
    assert parts[0] == parts[1] != parts[2]
    assert 330 < len(parts[0]) < 470


def test_wrong_lists_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    assert f"no list at {path}" in refusal(table_config(path))
    path.write_text("file,captions\na,b\n")
    assert "no column 'caption', only file, captions" in refusal(table_config(path))
    assert "no folder" in refusal(table_config(path, media=str(tmp_path / "no")))
    path.write_text("file,caption\na,b,c\n")
    assert f"{path} line 2 has more or fewer cells" in refusal(table_config(path))
    path.write_bytes("file,caption\na,für\n".encode("latin-1"))
    assert "not UTF-8" in refusal(table_config(path))
    path.write_text("file,caption\n,b\n")
    assert "has no name" in refusal(table_config(path))
    path.write_text("file,caption,start\na,b,soon\n")
    assert "'soon' is no number" in refusal(table_config(path, start_column="start"))
    for content in ("{", "[1]", '{"file": "a", "caption": 3}'):
        (tmp_path / "list.jsonl").write_text(content)
        assert "list.jsonl line 1" in refusal(table_config(tmp_path / "list.jsonl"))
    (tmp_path / "list.parquet").write_text("no parquet")
    assert "list.parquet cannot be read" in refusal(table_config(tmp_path / "list.parquet"))
    (tmp_path / "list.xlsx").touch()
    assert "no known form" in refusal(table_config(tmp_path / "list.xlsx"))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"recording_pattern": "("}, "recording_pattern"),
        ({"recording_pattern": r"\d+"}, "0 groups"),
        ({"recording_prefix": "freesound"}, "needs a recording_pattern"),
        ({"held_out_share": 1.5}, "held_out_share"),
    ],
)
def test_impossible_table_options_are_refused(options: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        table_config(Path("list.csv"), **options)


SEGMENTS = """# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids=3
# YTID, start_seconds, end_seconds, positive_labels
--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"
Y_a-b_cdefg, 0.000, 9.500, "/m/09x0r"
-0pJqpNjft4, 267.000, 277.000, "engine accelerating, revving, vroom;cow lowing"
"""
CLASSES = 'index,mid,display_name\n0,/m/09x0r,"Male speech, man speaking"\n1,/t/dd00088,"Gush"\n'


def audioset_config(tmp_path: Path, segments: str = SEGMENTS, **options: object) -> AudioSetConfig:
    (tmp_path / "segments.csv").write_text(segments)
    (tmp_path / "classes.csv").write_text(CLASSES)
    (tmp_path / "media").mkdir(exist_ok=True)
    return AudioSetConfig(
        segments=str(tmp_path / "segments.csv"),
        media=str(tmp_path / "media"),
        **options,  # type: ignore[arg-type]
    )


def test_a_segment_list_as_it_is_published(tmp_path: Path) -> None:
    records = list(audioset.records(audioset_config(tmp_path)))
    assert [record.name for record in records] == ["--PJHxphWEs_30000", "Y_a-b_cdefg_0", "-0pJqpNjft4_267000"]
    assert [record.recording for record in records] == [
        "youtube:--PJHxphWEs",
        "youtube:Y_a-b_cdefg",
        "youtube:-0pJqpNjft4",
    ]
    assert records[0].labels == ("/m/09x0r", "/t/dd00088")
    assert records[2].labels == ("engine accelerating, revving, vroom", "cow lowing")
    assert all(record.media is None and not record.captions for record in records)


def test_labels_become_names_and_captions(tmp_path: Path) -> None:
    segments = "\n".join(SEGMENTS.splitlines()[:5])
    config = audioset_config(tmp_path, segments, class_labels=str(tmp_path / "classes.csv"), captions_from_labels=True)
    first, second = audioset.records(config)
    assert first.labels == ("Male speech, man speaking", "Gush")
    assert first.captions == ("The sound of male speech, man speaking and gush",)
    assert second.captions == ("The sound of male speech, man speaking",)
    with pytest.raises(UserError, match="no label 'engine accelerating, revving, vroom'"):
        list(audioset.records(audioset_config(tmp_path, class_labels=str(tmp_path / "classes.csv"))))


@pytest.mark.parametrize(
    ("file", "is_cut"),
    [
        ("{}.mp4", False),
        ("Y{}.wav", False),
        ("{}_267.mp4", True),
        ("Y{}_267.000.wav", True),
        ("{}_000267.MP4", True),
        ("{}_267_277.webm", True),
        ("deep/er/Y{}_267.0_277.0.flac", True),
        ("{}_267000_277000.flac", True),
        ("{}_267000.flac", True),
    ],
)
def test_downloaders_names_are_found(tmp_path: Path, file: str, is_cut: bool) -> None:
    config = audioset_config(tmp_path)
    path = tmp_path / "media" / file.format("-0pJqpNjft4")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    *others, record = audioset.records(config)
    assert record.media == str(path)
    assert (record.start_seconds, record.end_seconds) == ((None, None) if is_cut else (267.0, 277.0))
    assert [other.media for other in others] == [None, None]


def test_of_several_files_the_cut_one_and_the_one_with_picture_is_taken(tmp_path: Path) -> None:
    config = audioset_config(tmp_path)
    for name in ("{0}.mp4", "{0}_267.flac", "{0}_267.mp4", "{0}_267.info.json", "{0}_267.jpg", "{0}_999.mp4"):
        (tmp_path / "media" / name.format("-0pJqpNjft4")).touch()
    assert list(audioset.records(config))[-1].media == str(tmp_path / "media/-0pJqpNjft4_267.mp4")


def test_the_file_of_another_segment_is_not_taken(tmp_path: Path) -> None:
    config = audioset_config(tmp_path, "abcdefghijk, 30.250, 40.250, x\nabcdefghijk, 30.000, 40.000, y\n")
    (tmp_path / "media/abcdefghijk_000030.mp4").touch()
    (tmp_path / "media/abcdefghijk_30.2.mp4").touch()
    quarter, full = audioset.records(config)
    assert quarter.media is None
    assert full.media == str(tmp_path / "media/abcdefghijk_000030.mp4")


@pytest.mark.parametrize("line", ["YTID,start,end,labels", "abc", "abc, 1.0"])
def test_a_line_that_is_no_segment_is_named(tmp_path: Path, line: str) -> None:
    config = audioset_config(tmp_path, f"# comment\n{line}\n")
    with pytest.raises(UserError, match=r"segments\.csv line 2"):
        list(audioset.records(config))


def test_missing_lists_and_folders_are_named(tmp_path: Path) -> None:
    config = audioset_config(tmp_path)
    for key in ("segments", "media", "class_labels"):
        with pytest.raises(UserError, match=f"at {tmp_path}/no"):
            list(audioset.records(replace(config, **{key: f"{tmp_path}/no"})))


def test_real_esc_splits_by_freesound_recording() -> None:
    path = REAL_DATA / "esc" / "captions.jsonl"
    if not path.is_file():
        pytest.skip("the ESC clips are not on this machine")
    config = table_config(
        path,
        name_column="id",
        caption_columns=["captions"],
        recording_pattern=r"\d+-(\d+)-",
        recording_prefix="freesound",
    )
    train, held_out = (list(table.records(replace(config, split=split))) for split in ("train", "held_out"))  # type: ignore[arg-type]
    assert len(train) + len(held_out) == 720
    assert {record.recording for record in train} & {record.recording for record in held_out} == set()
    assert "freesound:103298" in {record.recording for record in train + held_out}
    assert all(record.media is not None and Path(record.media).is_file() for record in train + held_out)


def test_the_published_lists_are_read() -> None:
    folder = REAL_DATA / "audioset"
    if not folder.is_dir():
        pytest.skip("the published AudioSet lists are not on this machine")
    config = AudioSetConfig(
        segments=str(folder / "eval.csv"),
        media=str(folder),
        class_labels=str(folder / "class_labels_indices.csv"),
        captions_from_labels=True,
    )
    records = list(audioset.records(config))
    assert len(records) == 20371
    labels = Counter(label for record in records for label in record.labels)
    assert len(labels) == 527
    assert labels.total() == 51804
