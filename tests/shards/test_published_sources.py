"""AudioCaps, Clotho and WavCaps: generated lists with every quirk of the published ones, and those themselves."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from audiotext_dist.data.sample import safe_key
from audiotext_dist.errors import UserError
from shards.build import AudioCapsBuild, AudioSetBuild, ClothoBuild, WavCapsBuild
from shards.record import Record
from shards.report import check_failed_share, summary, to_table
from shards.sources import audiocaps, audioset, clotho, wavcaps, youtube
from shards.sources.audiocaps import AudioCapsConfig
from shards.sources.audioset import AudioSetConfig
from shards.sources.clotho import ClothoConfig
from shards.sources.wavcaps import WavCapsConfig
from tests.built import build_rows
from tests.media_files import noise

REAL_DATA = Path(__file__).parents[3] / "shared" / "data"
RATE_HZ = 16000
PACKING = {"sample_rate_hz": RATE_HZ, "num_frames": 0, "num_workers": 1}


def touch(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return str(path)


def write_noise(path: Path, seconds: float = 0.1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, noise(round(seconds * RATE_HZ), seed=len(path.name)), RATE_HZ)


def refusal(records: Iterator[Record]) -> str:
    with pytest.raises(UserError) as caught:
        list(records)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def published(*parts: str) -> Path:
    path = REAL_DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"the published {parts[0]} lists are not on this machine")
    return path


# AudioCaps -----------------------------------------------------------------------------------------------------

AUDIOCAPS = """audiocap_id,youtube_id,start_time,caption
1,-0pJqpNjft4,267,"An engine, revving"
2,Y_a-b_cdefg,0,A cow
3,-0pJqpNjft4,267,A car
"""


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_the_rows_of_one_clip_become_one_record(tmp_path: Path, newline: str, bom: str) -> None:
    path = tmp_path / "list.csv"
    path.write_bytes((bom + AUDIOCAPS.replace("\n", newline)).encode())
    media = touch(tmp_path / "media/-0pJqpNjft4_267_277.wav")
    first, second = audiocaps.records(AudioCapsConfig(captions=str(path), media=str(tmp_path / "media")))
    assert first == Record(
        name="-0pJqpNjft4_267000",
        media=media,
        recording="youtube:-0pJqpNjft4",
        captions=["An engine, revving", "A car"],
    )
    assert (second.name, second.media, second.captions) == ("Y_a-b_cdefg_0", None, ["A cow"])


def test_a_whole_video_is_cut_unless_it_is_said_to_be_the_clip(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(AUDIOCAPS)
    media = touch(tmp_path / "media/Y-0pJqpNjft4.wav")
    cuts = []
    for whole_videos in (True, False):
        config = AudioCapsConfig(
            captions=str(tmp_path / "list.csv"), media=str(tmp_path / "media"), whole_videos=whole_videos
        )
        record = next(audiocaps.records(config))
        assert record.media == media
        cuts.append((record.start_seconds, record.end_seconds))
    assert cuts == [(267.0, 277.0), (None, None)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a,b\n1,2\n", "no column 'youtube_id', only a, b"),
        ("", "no column 'youtube_id'"),
        ("youtube_id,start_time,caption\nabcdefghijk,soon,x\n", "line 2: 'soon' is no start"),
        ("youtube_id,start_time,caption\nabcdefghijk,nan,x\n", "line 2: 'nan' is no start"),
        ("youtube_id,start_time,caption\nabcdefghijk,1\n", "line 2 has more or fewer cells"),
    ],
)
def test_wrong_audiocaps_lists_are_refused_by_place(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "list.csv").write_text(content)
    config = AudioCapsConfig(captions=str(tmp_path / "list.csv"), media=str(tmp_path))
    assert said in refusal(audiocaps.records(config))


@pytest.mark.parametrize(("split", "rows", "clips"), [("train", 49838, 49838), ("val", 2475, 495), ("test", 4875, 975)])
def test_the_published_audiocaps(tmp_path: Path, split: str, rows: int, clips: int) -> None:
    path = published("audiocaps", f"{split}.csv")
    config = AudioCapsConfig(captions=str(path), media=str(tmp_path))
    records = list(audiocaps.records(config))
    assert sum(len(record.captions) for record in records) == rows
    assert len({record.recording for record in records}) == len({record.name for record in records}) == clips
    assert all(caption == caption.strip() for record in records for caption in record.captions)


def test_a_part_of_the_published_audiocaps_is_packed(tmp_path: Path) -> None:
    path = published("audiocaps", "val.csv")
    everything = list(audiocaps.records(AudioCapsConfig(captions=str(path), media=str(tmp_path))))
    for record in everything[::100]:
        write_noise(tmp_path / "media" / f"{record.name}.wav")
    config = AudioCapsBuild(captions=str(path), media=str(tmp_path / "media"), out=str(tmp_path / "out"), **PACKING)
    rows = build_rows(config, list(audiocaps.records(config)))
    assert [row.name for row in rows if row.status == "written"] == [record.name for record in everything[::100]]
    assert len(rows) == len(everything)


# YouTube segments in three datasets ----------------------------------------------------------------------------


def test_audioset_audiocaps_and_wavcaps_agree_on_a_segment(tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    media = str(tmp_path / "media")
    (tmp_path / "as.csv").write_text('-0pJqpNjft4, 267.000, 277.000, "/m/1"\n')
    (tmp_path / "ac.csv").write_text("youtube_id,start_time,caption\n-0pJqpNjft4,267,x\n")
    (tmp_path / "wc.json").write_text('{"data": [{"id": "Y-0pJqpNjft4.wav", "caption": "x"}]}')
    (a,) = audioset.records(AudioSetConfig(segments=str(tmp_path / "as.csv"), media=media))
    (b,) = audiocaps.records(AudioCapsConfig(captions=str(tmp_path / "ac.csv"), media=media))
    (c,) = wavcaps.records(WavCapsConfig(captions=str(tmp_path / "wc.json"), subset="AudioSet_SL", media=media))
    assert a.recording == b.recording == c.recording == "youtube:-0pJqpNjft4"
    assert a.name == b.name


def test_the_published_lists_hold_one_segment_a_video(tmp_path: Path) -> None:
    """What makes a video's id good enough for a recording."""
    config = {"media": str(tmp_path)}
    records = [
        record
        for split in ("train_balanced", "eval")
        for record in audioset.records(AudioSetConfig(segments=str(published("audioset", f"{split}.csv")), **config))
    ]
    assert len(records) == len({record.recording for record in records}) == 42531


def test_of_the_published_audioset_what_is_there_is_packed(tmp_path: Path) -> None:
    path = published("audioset", "train_balanced.csv")
    everything = list(audioset.records(AudioSetConfig(segments=str(path), media=str(tmp_path))))
    chosen = [record.name for record in everything[::1108][:20]]
    for number, name in enumerate(chosen):
        write_noise(tmp_path / "media" / f"{'Y' * (number % 2)}{name}.wav")
    config = AudioSetBuild(
        segments=str(path), media=str(tmp_path / "media"), out=str(tmp_path / "out"), require_frames=False, **PACKING
    )
    rows = build_rows(config, list(audioset.records(config)))
    assert [row.name for row in rows if row.status == "written"] == chosen
    assert Counter(row.reason for row in rows) == {None: 20, "missing": 22140}


YTIDS = st.text("abYZ09_-", min_size=11, max_size=11)


@given(ytid=YTIDS, tenths=st.integers(0, 40_000), style=st.integers(0, 7), others=st.lists(YTIDS, max_size=3))
def test_a_file_is_found_under_every_name_and_no_other_is(
    tmp_path_factory: pytest.TempPathFactory, ytid: str, tenths: int, style: int, others: list[str]
) -> None:
    start, prefix = tenths / 10, "Y" if style % 2 else ""
    times = ["", f"_{start}", f"_{tenths * 100}_{tenths * 100 + 9000}", f"_{start:.3f}_{start + 10:.3f}"][style // 2]
    folder = tmp_path_factory.mktemp("media")
    path = touch(folder / f"{prefix}{ytid}{times}.flac")
    found = youtube.scan(str(folder))
    assert youtube.find(found, ytid, start) == (path, bool(times))
    assert youtube.find(found, ytid) == (path, bool(times))
    assert not times or youtube.find(found, ytid, start + 0.5) == (None, False)
    assert all(youtube.find(found, other, start) == (None, False) for other in others if other != ytid)


# Clotho --------------------------------------------------------------------------------------------------------

CLOTHO_NAMES = [
    "121006_rain&amp;storm.wav",
    "Breaking Glass .wav",
    " Ambience 1. [binaural], 2012.wav",
    "Grillons-d&#39;Italie.wav",
    "caf\u00e9 #2.wav",
    "Santa Motor.wav",
]
CLOTHO_HEADER = ["file_name", *clotho.CAPTION_COLUMNS]


def write_csv(path: Path, rows: list[list[str]], encoding: str = "utf-8") -> str:
    with path.open("w", encoding=encoding, newline="") as file:
        csv.writer(file).writerows(rows)
    return str(path)


def clotho_config(folder: Path, **options: object) -> ClothoConfig:
    (folder / "media").mkdir(exist_ok=True)
    rows = [[name, *(f"{number}, of {name}" for number in range(5))] for name in CLOTHO_NAMES]
    captions = write_csv(folder / "captions.csv", [CLOTHO_HEADER, *rows])
    return ClothoConfig(captions=captions, split="development", media=str(folder / "media"), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("unpacked_as", ["published", "plain"])
def test_clothos_file_names_are_found(tmp_path: Path, unpacked_as: str) -> None:
    config = clotho_config(tmp_path)
    plain = [
        "121006_rain&storm",
        "Breaking Glass",
        "Ambience 1. [binaural], 2012",
        "Grillons-d'Italie",
        "cafe\u0301 #2",
    ]
    names = CLOTHO_NAMES[:5] if unpacked_as == "published" else [f"{stem}.flac" for stem in plain]
    paths = [touch(tmp_path / "media/development" / name) for name in names]
    records = list(clotho.records(config))
    assert [record.media for record in records] == [*paths, None]
    assert [record.name for record in records] == [f"development/{name}" for name in CLOTHO_NAMES]
    assert all(len(record.captions) == 5 for record in records)
    keys = {safe_key(record.name) for record in records}
    assert len(keys) == len(records)


def test_a_name_that_two_files_could_have_is_not_guessed(tmp_path: Path) -> None:
    config = clotho_config(tmp_path)
    exact = touch(tmp_path / "media/Breaking Glass .wav")
    for name in ("Breaking Glass.wav", "Santa Motor .wav", " Santa Motor.wav"):
        touch(tmp_path / "media" / name)
    records = list(clotho.records(config))
    assert (records[1].media, records[5].media) == (exact, None)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8-sig"])
def test_clothos_metadata_gives_recordings_and_labels(tmp_path: Path, encoding: str) -> None:
    rows = [
        ["file_name", "keywords", "sound_id", "sound_link"],
        ["caf\u00e9 #2.wav", "people; caf\u00e9;", "123", "https"],
        ["Santa Motor.wav", "", "Not found", ""],
        ["121006_rain&storm.wav", "rain", "77", ""],
    ]
    config = clotho_config(tmp_path, metadata=write_csv(tmp_path / "metadata.csv", rows, encoding))
    records = {record.name.partition("/")[2]: record for record in clotho.records(config)}
    assert records["caf\u00e9 #2.wav"].recording == "freesound:123"
    assert records["caf\u00e9 #2.wav"].labels == ["people", "caf\u00e9"]
    assert records["121006_rain&amp;storm.wav"].recording == "freesound:77"
    assert records["Santa Motor.wav"].recording == "clotho:development:Santa Motor.wav"
    assert records["Breaking Glass .wav"].recording == "clotho:development:Breaking Glass .wav"


def test_the_metadata_of_another_split_is_refused(tmp_path: Path) -> None:
    rows = [["file_name", "sound_id"], ["other.wav", "1"]]
    config = clotho_config(tmp_path, metadata=write_csv(tmp_path / "metadata.csv", rows))
    assert "names no clip" in refusal(clotho.records(config))


def test_the_published_clotho(tmp_path: Path) -> None:
    names: Counter[str] = Counter()
    for split, clips in (("development", 3839), ("validation", 1045), ("evaluation", 1045)):
        path = published("clotho", f"clotho_captions_{split}.csv")
        config = ClothoConfig(captions=str(path), split=split, media=str(tmp_path))  # type: ignore[arg-type]
        records = list(clotho.records(config))
        assert len(records) == clips
        assert all(len(record.captions) == 5 for record in records)
        names.update(safe_key(record.name) for record in records)
    assert len(names) == 5929


def test_a_part_of_the_published_clotho_is_packed(tmp_path: Path) -> None:
    path = published("clotho", "clotho_captions_validation.csv")
    with path.open(encoding="utf-8", newline="") as file:
        names = [row["file_name"] for row in csv.DictReader(file)]
    chosen = [name for name in names if any(mark in name for mark in ("&", "#", " .wav", "[", ". "))]
    assert len(chosen) > 20
    for name in chosen:
        write_noise(tmp_path / "media" / name)
    config = ClothoBuild(
        captions=str(path), split="validation", media=str(tmp_path / "media"), out=str(tmp_path / "out"), **PACKING
    )
    rows = build_rows(config, list(clotho.records(config)))
    assert [row.name for row in rows if row.status == "written"] == [f"validation/{name}" for name in chosen]
    assert Counter(row.reason for row in rows) == {None: len(chosen), "missing": len(names) - len(chosen)}


# WavCaps -------------------------------------------------------------------------------------------------------

# One row of each part as it is published.
WAVCAPS_ROWS = {
    "AudioSet_SL": {"id": "Yb0RFKhbpFJA.wav", "caption": "Wind.", "audio": "wav_path", "duration": 10.0},
    "BBC_Sound_Effects": {"description": "d", "category": "['Nature']", "caption": "Wind.", "id": "NHU05051026"},
    "FreeSound": {"id": "180913", "file_name": "UK Mello.wav", "tags": ["Standard"], "caption": "Wind."},
    "SoundBible": {"title": "t", "href": "2219-A.html", "caption": "Wind.", "id": "2219", "duration": 14.1},
}
WAVCAPS_RECORDINGS = {
    "AudioSet_SL": "youtube:b0RFKhbpFJA",
    "BBC_Sound_Effects": "BBC_Sound_Effects:NHU05051026",
    "FreeSound": "freesound:180913",
    "SoundBible": "SoundBible:2219",
}


def wavcaps_config(folder: Path, part: str, rows: list[dict[str, object]], **options: object) -> WavCapsConfig:
    (folder / "media").mkdir(exist_ok=True)
    (folder / "list.json").write_text(json.dumps({"num_captions_per_audio": 1, "data": rows}))
    return WavCapsConfig(
        captions=str(folder / "list.json"),
        subset=part,  # type: ignore[arg-type]
        media=str(folder / "media"),
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("part", list(WAVCAPS_ROWS))
def test_every_part_of_wavcaps(tmp_path: Path, part: str) -> None:
    row = WAVCAPS_ROWS[part]
    config = wavcaps_config(tmp_path, part, [row])
    assert next(wavcaps.records(config)).media is None
    media = touch(tmp_path / "media/sub" / (str(row["id"]).removesuffix(".wav") + ".flac"))
    assert list(wavcaps.records(config)) == [
        Record(name=f"{part}/{row['id']}", media=media, recording=WAVCAPS_RECORDINGS[part], captions=("Wind.",))
    ]


def freesound_rows(*ids: str) -> list[dict[str, object]]:
    return [{"id": clip_id, "caption": "x"} for clip_id in ids]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("first_column.csv", "sound_id,why\n2,x\n30,y\n99,z\n"),
        ("id_column.csv", "\ufeffindex,id\r\n1,2\r\n5,30\r\n7,Yb0RFKhbpFJA.wav\r\n8,Not found\r\n\r\n"),
        ("blacklist.json", '{"AudioSet": ["Yb0RFKhbpFJA.wav"], "FreeSound": ["2", "30"]}'),
    ],
)
def test_exclusion_lists_in_their_forms(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    exclude = [str(tmp_path / name)]
    config = wavcaps_config(tmp_path, "FreeSound", freesound_rows("1", "2", "30", "5"), exclude=exclude)
    assert [record.excluded_by for record in wavcaps.records(config)] == [(), tuple(exclude), tuple(exclude), ()]


def test_a_freesound_number_does_not_exclude_soundbibles(tmp_path: Path) -> None:
    (tmp_path / "exclude.csv").write_text("id\n2219\n")
    exclude = {"exclude": [str(tmp_path / "exclude.csv")]}
    config = wavcaps_config(tmp_path, "SoundBible", [WAVCAPS_ROWS["SoundBible"]], **exclude)
    assert "exclude.csv excludes no clip of SoundBible" in refusal(wavcaps.records(config))
    config = wavcaps_config(
        tmp_path, "SoundBible", [WAVCAPS_ROWS["SoundBible"]], allow_unused_exclusions=True, **exclude
    )
    assert [record.excluded_by for record in wavcaps.records(config)] == [()]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[1]", 'is not {"data"'),
        ('{"data": 3}', 'is not {"data"'),
        ('{"data": [[]]}', "row 0 has no 'id'"),
        ('{"data": [{"id": 3, "caption": "x"}]}', "row 0 has no 'id'"),
        ('{"data": [{"id": "1"}]}', "row 0 has no 'id'"),
        ('{"data": [{"id": "1.wav", "caption": "x"}]}', "row 0: id '1.wav' is not Y{ytid}.wav"),
        ("{", "is not JSON"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_wrong_wavcaps_lists_are_refused(tmp_path: Path, content: str, said: str) -> None:
    config = wavcaps_config(tmp_path, "AudioSet_SL", [])
    Path(config.captions).write_text(content)
    assert said in refusal(wavcaps.records(config))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("no.csv", None, "no list at"),
        ("no.json", None, "no list at"),
        ("list.json", "[1]", "give a black list"),
        ("list.csv", "id\nNot found\n", "list.csv excludes no clip of FreeSound"),
    ],
)
def test_wrong_exclusion_lists_are_refused(tmp_path: Path, name: str, content: str | None, said: str) -> None:
    (tmp_path / "lists").mkdir()
    if content is not None:
        (tmp_path / "lists" / name).write_text(content)
    config = wavcaps_config(tmp_path, "FreeSound", freesound_rows("1"), exclude=[str(tmp_path / "lists" / name)])
    assert said in refusal(wavcaps.records(config))


def test_excluded_rows_are_accounted_for_and_are_no_failures(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id\n2\n3\n")
    (tmp_path / "b.json").write_text('{"FreeSound": ["3"]}')
    listed = wavcaps_config(
        tmp_path,
        "FreeSound",
        freesound_rows("1", "2", "3", "4"),
        exclude=[str(tmp_path / "a.csv"), str(tmp_path / "b.json")],
    )
    for clip_id in ("1", "2", "3"):
        write_noise(tmp_path / "media" / f"{clip_id}.wav")
    config = WavCapsBuild(
        **{name: getattr(listed, name) for name in ("captions", "subset", "media", "exclude")},
        out=str(tmp_path / "out"),
        **PACKING,
    )
    rows = build_rows(config, list(wavcaps.records(config)))
    assert [row.reason for row in rows] == [None, "excluded", "excluded", "missing"]
    assert summary(to_table(rows)).splitlines()[1:] == ["1 failed: missing", "2 excluded"]
    check_failed_share(to_table(rows), 0.5)
    with pytest.raises(UserError, match=r"50\.0% of 2 clips failed"):
        check_failed_share(to_table(rows), 0.4)
    with pytest.raises(UserError, match="all of 2 clips are excluded"):
        check_failed_share(to_table(rows[1:3]), 1.0)
    (tmp_path / "a.csv").write_text("id\n2\n4\n")
    with pytest.raises(UserError, match="begun with exclude="):
        build_rows(config, list(wavcaps.records(config)))


def test_the_published_soundbible_is_packed_in_part(tmp_path: Path) -> None:
    path = published("wavcaps", "json_files", "SoundBible", "sb_final.json")
    for clip_id in ("2219", "2218"):
        write_noise(tmp_path / "media" / f"{clip_id}.flac")
    config = WavCapsBuild(
        captions=str(path), subset="SoundBible", media=str(tmp_path / "media"), out=str(tmp_path / "out"), **PACKING
    )
    rows = build_rows(config, list(wavcaps.records(config)))
    assert Counter(row.reason for row in rows) == {None: 2, "missing": 1230}


@pytest.mark.parametrize(
    ("part", "name", "excluded"),
    [
        ("AudioSet_SL", "blacklist_audiocaps.full.csv", 51308),
        ("AudioSet_SL", "json_files/blacklist/blacklist_exclude_all_ac.json", 50725),
        ("AudioSet_SL", "json_files/blacklist/blacklist_exclude_test_ac.json", 1451),
        ("FreeSound", "json_files/blacklist/blacklist_exclude_test_ac.json", 2077),
        ("FreeSound", "json_files/blacklist/blacklist_exclude_ub8k_esc50_vggsound.json", 2219),
        ("FreeSound", "blacklist_clotho.full.csv", 6904),
        ("FreeSound", "blacklist_clotho.full.v2.csv", 7941),
    ],
)
def test_the_published_exclusion_lists(tmp_path: Path, part: str, name: str, excluded: int) -> None:
    """Each against a list that holds exactly its clips, and one more."""
    path = published("wavcaps", *name.split("/"))
    if name.endswith(".csv"):
        listed = {line.split(",")[1].strip() for line in path.read_text().splitlines()[1:]}
    else:
        listed = set(json.loads(path.read_text())["AudioSet" if part == "AudioSet_SL" else "FreeSound"])
    listed.discard("Not found")
    ids = [*sorted(listed), "Yaaaaaaaaaaa.wav" if part == "AudioSet_SL" else "0"]
    config = wavcaps_config(tmp_path, part, freesound_rows(*ids), exclude=[str(path)])
    records = list(wavcaps.records(config))
    assert sum(bool(record.excluded_by) for record in records) == excluded == len(records) - 1


# Hostile names -------------------------------------------------------------------------------------------------

HOSTILE = ["../secret", "../../secret", "/etc/hostname", "a\0b", "x" * 300, "media/../../secret", "", ".", ".."]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_lead_out_of_the_folder_find_nothing(tmp_path: Path, name: str) -> None:
    write_noise(tmp_path / "secret.wav")
    config = wavcaps_config(tmp_path, "FreeSound", freesound_rows(name))
    assert [record.media for record in wavcaps.records(config)] == [None]
    captions = write_csv(tmp_path / "captions.csv", [CLOTHO_HEADER, [f"{name}.wav", *"abcde"]])
    of_clotho = ClothoConfig(captions=captions, split="validation", media=config.media)
    assert [record.media for record in clotho.records(of_clotho)] == [None]
    captions = write_csv(tmp_path / "audiocaps.csv", [["youtube_id", "start_time", "caption"], [name, "0", "x"]])
    of_audiocaps = AudioCapsConfig(captions=captions, media=config.media)
    assert [record.media for record in audiocaps.records(of_audiocaps)] == [None]


def test_hostile_names_are_packed_as_missing(tmp_path: Path) -> None:
    rows = freesound_rows(*(name for name in HOSTILE))
    listed = wavcaps_config(tmp_path, "FreeSound", rows)
    config = WavCapsBuild(
        captions=listed.captions, subset="FreeSound", media=listed.media, out=str(tmp_path / "out"), **PACKING
    )
    reports = build_rows(config, list(wavcaps.records(config)))
    assert [report.reason for report in reports] == ["missing"] * len(HOSTILE)
    assert all("/" not in report.key and "." not in report.key and len(report.key) <= 120 for report in reports)


def test_a_text_that_is_no_unicode_is_named(tmp_path: Path) -> None:
    listed = wavcaps_config(tmp_path, "FreeSound", [{"id": "1", "caption": "half an emoji \ud83d"}])
    config = WavCapsBuild(
        captions=listed.captions, subset="FreeSound", media=listed.media, out=str(tmp_path / "out"), **PACKING
    )
    with pytest.raises(UserError, match="row 0, 'FreeSound/1', is no valid Unicode"):
        build_rows(config, list(wavcaps.records(config)))
