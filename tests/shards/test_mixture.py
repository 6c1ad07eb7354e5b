"""The mixture `all` of Correspondences, from lists in their published forms: what an epoch over it holds."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import soundfile

from audiotext_dist.data.decode import decode_metadata
from audiotext_dist.data.sample import METADATA_MEMBER, ClipMetadata
from audiotext_dist.data.sets import make_plan, open_sets
from audiotext_dist.data.shard_reader import ShardReader
from audiotext_dist.training.recipe import read_recipe
from shards.build import AudioCapsBuild, ClothoBuild, WavCapsBuild, build
from shards.sources import audiocaps, clotho, wavcaps
from tests.media_files import noise

RATE_HZ = 16000
PACKING = {"sample_rate_hz": RATE_HZ, "num_frames": 0, "num_workers": 1, "max_failed_share": 1.0}
RECIPE = Path(__file__).parents[2] / "launch" / "recipes" / "correspondences" / "all" / "passt_stage1.yaml"


def sound(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, noise(RATE_HZ // 10, seed=len(path.name)), RATE_HZ)


def build_clotho(folder: Path) -> None:
    """Two clips; Freesound knows the first as 111."""
    rows = [",".join([f"rain {n}.wav", *(f"rain {n} number {k}" for k in range(5))]) for n in (1, 2)]
    head = ",".join(["file_name", *(f"caption_{k}" for k in range(1, 6))])
    (folder / "clotho.csv").write_text("\n".join([head, *rows]))
    (folder / "metadata.csv").write_text(
        "file_name,keywords,sound_id\nrain 1.wav,rain,111\nrain 2.wav,rain,Not found\n"
    )
    for n in (1, 2):
        sound(folder / "clotho" / f"rain {n}.wav")
    config = ClothoBuild(
        split="development",
        captions=str(folder / "clotho.csv"),
        metadata=str(folder / "metadata.csv"),
        media=str(folder / "clotho"),
        out=str(folder / "data" / "clotho-development"),
        **PACKING,
    )
    build(config, list(clotho.records(config)))


def build_audiocaps(folder: Path) -> None:
    (folder / "train.csv").write_text(
        "audiocap_id,youtube_id,start_time,caption\n1,-0pJqpNjft4,30,A cow\n2,b0RFKhbpFJA,0,An engine\n"
    )
    for ytid in ("-0pJqpNjft4", "b0RFKhbpFJA"):
        sound(folder / "audiocaps" / f"{ytid}.wav")
    config = AudioCapsBuild(
        captions=str(folder / "train.csv"),
        media=str(folder / "audiocaps"),
        whole_videos=False,
        require_frames=False,
        out=str(folder / "data" / "audiocaps-train"),
        **PACKING,
    )
    build(config, list(audiocaps.records(config)))


def build_wavcaps(folder: Path) -> None:
    """Of three Freesound clips the list leaves two out, one of them Clotho's 111."""
    (folder / "excluded.csv").write_text("id,name\n111,rain\n112,more rain\n")
    parts = {
        "AudioSet_SL": ["Yb0RFKhbpFJA.wav"],
        "BBC_Sound_Effects": ["NHU05051026"],
        "FreeSound": ["111", "112", "113"],
        "SoundBible": ["2219"],
    }
    for part, ids in parts.items():
        rows = [{"id": clip_id, "caption": f"{part} {clip_id}", "duration": 0.1} for clip_id in ids]
        (folder / f"{part}.json").write_text(json.dumps({"num_captions_per_audio": 1, "data": rows}))
        for clip_id in ids:
            sound(folder / part / f"{clip_id.removesuffix('.wav')}.wav")
        config = WavCapsBuild(
            subset=part,
            captions=str(folder / f"{part}.json"),
            media=str(folder / part),
            exclude=[str(folder / "excluded.csv")],
            allow_unused_exclusions=True,
            out=str(folder / "data" / f"wavcaps-{part}"),
            **PACKING,
        )
        build(config, list(wavcaps.records(config)))


def test_an_epoch_of_the_mixture_holds_every_pair_once_and_none_that_is_excluded(tmp_path: Path) -> None:
    build_clotho(tmp_path)
    build_audiocaps(tmp_path)
    build_wavcaps(tmp_path)
    data = read_recipe([f"recipe={RECIPE}", f"data.sample_rate_hz={RATE_HZ}"]).data
    moved = {name: f"{tmp_path}/{chosen.shards}" for name, chosen in data.train.items()}
    words = [f"data.train.{name}.shards={folder}" for name, folder in moved.items()]
    data = read_recipe([f"recipe={RECIPE}", f"data.sample_rate_hz={RATE_HZ}", *words]).data
    sets = open_sets(data.train, data, frames=False, captions=True)
    shards = [shard for each in sets for shard in each]
    plan = make_plan(sets, data, seed=0, epoch=0, global_batch_size=1, world_size=1)
    reader = ShardReader(shards)
    found: Counter[str] = Counter()
    clips: dict[str, ClipMetadata] = {}
    for number in range(plan.num_batches):
        (slot,) = plan.batch(number)
        key = shards[slot.shard].index.keys[slot.row]
        clips[key] = decode_metadata(reader.read(slot.shard, slot.row, METADATA_MEMBER), key)
        found[clips[key].name] += 1
    assert found == {
        "development/rain 1.wav": 5,
        "development/rain 2.wav": 5,
        "-0pJqpNjft4_30000": 1,
        "b0RFKhbpFJA_0": 1,
        "AudioSet_SL/Yb0RFKhbpFJA.wav": 1,
        "BBC_Sound_Effects/NHU05051026": 1,
        "FreeSound/113": 1,
        "SoundBible/2219": 1,
    }
    recordings = Counter(clip.recording for clip in clips.values())
    # The same YouTube clip in AudioCaps and in WavCaps is one recording.
    assert recordings.pop("youtube:b0RFKhbpFJA") == 2
    assert set(recordings.values()) == {1}
