from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import soundfile
import webdataset

from audiotext_dist import storage
from audiotext_dist.data.index import ShardIndex
from audiotext_dist.data.sample import Sample
from audiotext_dist.data.shard_list import write_list
from audiotext_dist.errors import UserError
from shards.finished import list_rows
from shards.report import REPORT_NAME, row_report, to_parquet, to_table
from shards.verify import Verification, VerifyConfig, main, verify
from tests.clips import make_sample, write_shards

REPOSITORY = Path(__file__).parents[2]


def make_set(folder: Path, first: int = 0, change: Callable[[Sample], Sample] | None = None) -> Path:
    """Two shards of three clips; ``change`` alters the second clip of all."""
    samples = [make_sample(first + number) for number in range(6)]
    if change is not None:
        samples[1] = change(samples[1])
    write_shards(folder, [samples[:3], samples[3:]])
    return folder


def check(decode: bool = True, **splits: Path) -> Verification:
    return verify(
        VerifyConfig(splits={name: str(folder) for name, folder in splits.items()}, num_workers=1, decode=decode)
    )


def kinds(result: Verification) -> list[str]:
    return [finding.kind for finding in result.findings]


def with_metadata(**changes: object) -> Callable[[Sample], Sample]:
    return lambda sample: replace(sample, metadata=replace(sample.metadata, **changes))  # type: ignore[arg-type]


def change_index(folder: Path, change: Callable[[dict], None]) -> None:
    path = folder / "00000.index.json"
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))


def test_a_clean_set_is_clean_whatever_the_workers(tmp_path: Path) -> None:
    train, test = make_set(tmp_path / "train"), make_set(tmp_path / "test", first=100)
    result = check(train=train, test=test)
    assert result.findings == []
    assert result.num_errors == 0
    summary = result.splits["train"]
    assert (summary.shards, summary.clips, summary.captions) == (2, 6, 12)
    assert summary.hours == pytest.approx(6 / 3600)
    assert summary.sample_rates_hz == {8000: 6}
    splits = {"train": str(train), "test": str(test)}
    assert verify(VerifyConfig(splits=splits, num_workers=2)) == result


def test_a_recording_of_two_splits_is_leakage_once(tmp_path: Path) -> None:
    leaky = make_set(tmp_path / "test", 100, lambda sample: with_metadata(recording="test:4")(sample))
    result = check(train=make_set(tmp_path / "train"), test=leaky)
    assert kinds(result) == ["leakage"]
    (finding,) = result.findings
    assert (finding.place, finding.split) == ("test:4", "test train")
    assert "clip-0004" in finding.detail
    assert "clip-0101" in finding.detail


def test_a_recording_twice_in_one_split_is_no_leakage(tmp_path: Path) -> None:
    assert kinds(check(train=make_set(tmp_path / "train", 0, with_metadata(recording="test:4")))) == []


def test_a_key_that_stands_in_for_an_unknown_recording_is_no_leakage(tmp_path: Path) -> None:
    splits = {name: make_set(tmp_path / name, 0, with_metadata(recording="clip-0001")) for name in ("train", "test")}
    shared = [finding.place for finding in check(**splits).findings if finding.kind == "leakage"]
    assert shared == ["test:0", "test:2", "test:3", "test:4", "test:5"]


def test_a_key_that_comes_twice_is_a_warning_that_names_both(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "train", 0, lambda sample: replace(sample, key="clip-0004"))
    result = check(train=folder)
    assert kinds(result) == ["duplicate_key"]
    assert result.num_errors == 0
    assert "00000.tar" in result.findings[0].detail
    assert "00001.tar" in result.findings[0].detail


@pytest.mark.parametrize(("text", "kind"), [([], "no_captions"), (["a dog", " .\n"], "empty_caption")])
def test_missing_and_empty_captions_are_warnings(tmp_path: Path, text: list[str], kind: str) -> None:
    result = check(train=make_set(tmp_path / "train", 0, with_metadata(text=text)))
    assert kinds(result) == [kind]
    assert result.findings[0].place.endswith("clip-0001")
    assert result.num_errors == 0


def test_sample_rates_that_differ_are_a_warning(tmp_path: Path) -> None:
    other = make_set(tmp_path / "train", 0, lambda sample: make_sample(1, sample_rate_hz=16000))
    assert kinds(check(train=other)) == ["sample_rates_differ"] * 2


def cut_flac(sample: Sample) -> Sample:
    return replace(sample, flac=sample.flac[: len(sample.flac) // 2])


def short_flac(sample: Sample) -> Sample:
    content = io.BytesIO()
    soundfile.write(content, np.ones(800, np.int16), 8000, format="FLAC")
    return replace(sample, flac=content.getvalue())


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        (cut_flac, "audio"),
        (short_flac, "audio has 0.1 s, its json says 1 s"),
        (lambda sample: replace(sample, flac=b"RIFF no flac"), "audio does not decode"),
        (lambda sample: replace(sample, frames=[*sample.frames[:3], b"\xff\xd8 no jpeg"]), "jpg does not decode"),
        (with_metadata(sample_rate=32000), "audio has 8000 Hz, not 32000"),
        (with_metadata(frame_times=[0.1, 0.2]), "4 frames, not 2"),
    ],
)
def test_a_clip_that_training_could_not_read_is_named(
    tmp_path: Path, change: Callable[[Sample], Sample], detail: str
) -> None:
    result = check(train=make_set(tmp_path / "train", 0, change))
    assert kinds(result) == ["undecodable"]
    assert result.findings[0].place.endswith("00000.tar clip-0001")
    assert detail in result.findings[0].detail


def test_decode_false_does_not_decode(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "train", 0, lambda sample: replace(sample, frames=[b"no jpeg"]))
    assert kinds(check(train=folder, decode=False)) == []
    assert kinds(check(train=folder)) == ["undecodable"]


def test_a_tar_cut_short(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "train")
    content = (folder / "00000.tar").read_bytes()
    (folder / "00000.tar").write_bytes(content[: len(content) // 2])
    result = check(train=folder)
    assert kinds(result) == ["wrong_size", "broken_tar"]
    assert result.splits["train"].clips == 3


def test_one_changed_bit(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "train")
    index = ShardIndex.from_json((folder / "00000.index.json").read_bytes(), "index")
    content = bytearray((folder / "00000.tar").read_bytes())
    offset, num_bytes = index.span(1, "flac") or (0, 0)
    content[offset + num_bytes // 2] ^= 1
    (folder / "00000.tar").write_bytes(content)
    assert kinds(check(train=folder))[0] == "wrong_checksum"


def move_a_member(content: dict) -> None:
    content["members"]["flac"][1][0] += 1


def rename_a_key(content: dict) -> None:
    content["keys"][0] = "other"


def rename_a_recording(content: dict) -> None:
    content["recordings"][0] = "other"


@pytest.mark.parametrize("change", [move_a_member, rename_a_key, rename_a_recording])
def test_an_index_that_leads_astray(tmp_path: Path, change: Callable[[dict], None]) -> None:
    folder = make_set(tmp_path / "train")
    change_index(folder, change)
    assert kinds(check(train=folder)) == ["wrong_index"]


def test_an_index_that_is_none(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "train")
    (folder / "00001.index.json").write_text("{")
    assert kinds(check(train=folder)) == ["broken_index"]


def test_a_list_of_other_shards(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "train")
    rows = list_rows(str(folder))
    write_list(str(folder), rows)
    assert kinds(check(train=folder)) == []
    write_list(str(folder), rows[1:])
    assert kinds(check(train=folder)) == ["wrong_list"]


def test_an_index_that_tells_of_other_captions(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "train")
    change_index(folder, lambda index: index.update(num_captioned=1))
    assert kinds(check(train=folder)) == ["wrong_index"]


def test_a_tar_without_index_among_others_is_unfinished(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "train")
    (folder / "00001.index.json").unlink()
    assert kinds(check(train=folder)) == ["unfinished"]
    (folder / "00000.index.json").unlink()
    assert kinds(check(train=folder)) == [], "a set made elsewhere has no indexes"


def test_lost_tars_are_missed_by_their_index_or_by_the_report(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "train")
    (folder / "00001.tar").unlink()
    assert kinds(check(train=folder)) == ["missing_shard"]
    (folder / "00001.index.json").unlink()
    rows = [row_report(row, f"clip {row}", make_sample(row), f"0000{row // 3}.tar") for row in range(6)]
    (folder / REPORT_NAME).write_bytes(to_parquet(to_table(rows)))
    result = check(train=folder)
    assert kinds(result) == ["missing_shard"]
    assert result.findings[0].detail == "the report has 3 clips in it"


def test_a_build_that_did_not_come_to_its_end(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "train")
    (folder / "build.json").write_text("{}")
    assert kinds(check(train=folder)) == ["unfinished"]


def test_a_remote_set(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "train")
    for path in folder.iterdir():
        storage.write_bytes(f"memory://verify-train/{path.name}", path.read_bytes())
    result = verify(VerifyConfig(splits={"train": "memory://verify-train"}, num_workers=1))
    assert result.findings == []
    assert result.splits["train"].clips == 6


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shards.verify", *words]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_speaks_to_people_and_machines(tmp_path: Path) -> None:
    train, bad = make_set(tmp_path / "train"), make_set(tmp_path / "bad", 100, with_metadata(text=[]))
    warned = run(f"train={train}", f"test={bad}", "num_workers=1", f"json={tmp_path / 'v.json'}")
    assert warned.returncode == 0, warned.stderr
    assert warned.stdout.endswith("clean: 0 errors, 1 warnings\n")
    found = json.loads((tmp_path / "v.json").read_bytes())
    assert (found["clean"], found["counts"]) == (True, {"no_captions": 1})
    leaky = run(f"train={train}", f"test={train}", "num_workers=1", "examples=1")
    assert leaky.returncode == 1
    assert "error   leakage                    6" in leaky.stdout
    assert "... and 5 more" in leaky.stdout
    wrong = run(f"train={tmp_path / 'none'}")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize("words", [["decode=false"], ["train"], ["train=somewhere", "num_workers=0"]])
def test_wrong_words_are_refused(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.setattr("sys.argv", ["verify", *words])
    with pytest.raises(UserError):
        main()


def test_webdataset_and_laion_clap_read_the_tars(tmp_path: Path) -> None:
    """LAION-CLAP takes {key}.flac by soundfile and the captions under "text" of {key}.json."""
    folder = make_set(tmp_path / "train")
    pipeline = webdataset.DataPipeline(
        webdataset.SimpleShardList([str(folder / "00000.tar"), str(folder / "00001.tar")]),
        webdataset.tarfile_to_samples(),
        webdataset.decode(webdataset.handle_extension("flac", lambda flac: soundfile.read(io.BytesIO(flac))[0])),
    )
    found = list(pipeline)
    assert [sample["__key__"] for sample in found] == [f"clip-{number:04d}" for number in range(6)]
    assert all(sample["flac"].shape == (8000,) for sample in found)
    assert [sample["json"]["text"][0] for sample in found] == [f"sound {number}" for number in range(6)]


def test_open_clips_pipeline_reads_the_tars(tmp_path: Path) -> None:
    """The stages of open_clip_train.data.get_wds_dataset, with open_clip's own preprocessing and tokenizer."""
    preprocess = open_clip.image_transform(32, is_train=False)
    tokenize = open_clip.SimpleTokenizer()
    folder = make_set(tmp_path / "train")
    pipeline = webdataset.DataPipeline(
        webdataset.SimpleShardList([str(folder / "00000.tar")]),
        webdataset.tarfile_to_samples(),
        webdataset.decode("pilrgb"),
        webdataset.rename(image="0.jpg", text="json"),
        webdataset.map_dict(image=preprocess, text=lambda found: tokenize(found["text"][0])[0]),
        webdataset.to_tuple("image", "text"),
        webdataset.batched(3),
    )
    ((images, texts),) = pipeline
    assert images.shape == (3, 3, 32, 32)
    assert [tokenize.decode(text.tolist()).split("<end_of_text>")[0] for text in texts] == [
        f"<start_of_text>sound {number} " for number in range(3)
    ]


def test_the_members_stand_together_as_streaming_readers_need(tmp_path: Path) -> None:
    with tarfile.open(make_set(tmp_path / "train") / "00000.tar") as tar:
        keys = [name.split(".")[0] for name in tar.getnames()]
    assert keys == sorted(keys)


def test_a_tar_whose_members_stand_apart_is_no_stream(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "train")
    with tarfile.open(folder / "00000.tar") as tar:
        content = {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]
    (folder / "00000.tar").unlink()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for name in sorted(content, key=lambda name: name.partition(".")[2]):
            entry = tarfile.TarInfo(name)
            entry.size = len(content[name])
            tar.addfile(entry, io.BytesIO(content[name]))
    found = verify(VerifyConfig(splits={"train": str(folder)}, num_workers=1)).findings
    assert "unstreamable" in {finding.kind for finding in found}
