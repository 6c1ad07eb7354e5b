"""Feature files: rows that belong to their clips, files that are refused, batches that read them."""

import shutil
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from audiotext_dist.data.decode import square_frame
from audiotext_dist.data.feature_files import open_features, read_feature_file
from audiotext_dist.data.features import FeatureReader
from audiotext_dist.data.loader import EvaluationBatches, TrainingBatches
from audiotext_dist.data.read_counts import ReadCounts
from audiotext_dist.data.sample import ClipMetadata, frame_member
from audiotext_dist.data.shard import load_shards
from audiotext_dist.data.shard_reader import ShardReader
from audiotext_dist.data.workers import iterate
from audiotext_dist.distributed import World
from audiotext_dist.errors import UserError
from audiotext_dist.training.prepare import build_towers, prepare
from audiotext_dist.training.recipe import read_recipe
from audiotext_dist.training.step import model_inputs
from launch import embed
from tests.clips import SAMPLE_RATE_HZ, make_sample, write_shards
from tests.object_store import server, use

CPU = torch.device("cpu")
SMALL = [
    "name=test",
    f"data.sample_rate_hz={SAMPLE_RATE_HZ}",
    "data.clip_seconds=1.0",
    "data.num_workers=0",
    "data.num_lanes=2",
    "model.audio.name=tiny-audio-32",
    "model.audio.stride_frames=32",
    "model.audio.stride_bins=32",
    "model.audio.fbank.num_fbank_frames=98",
    "model.audio.fbank.time_mask_frames=20",
    "model.image.name=tiny-64",
    "model.text.name=tiny-64",
    "training.global_batch_size=4",
]
PICTURES, CAPTIONS = [*SMALL, "task=audio-image"], [*SMALL, "task=audio-text"]


def clip(number: int):
    """From one to three captions a clip."""
    return make_sample(number, captions=[f"sound {number} said {n} times" for n in range(1 + number % 3)])


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "set", [[clip(6 * shard + row) for row in range(6)] for shard in range(3)])


@pytest.fixture
def run_embed(monkeypatch):
    def run(*words: str, rank: int = 0, size: int = 1) -> None:
        monkeypatch.setattr(sys, "argv", ["embed.py", *words])
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(size))
        embed.main()
        monkeypatch.delenv("RANK")
        monkeypatch.delenv("WORLD_SIZE")

    return run


def prepared(shards: str, tmp_path: Path, *words: str):
    sets = [f"data.train.own.shards={shards}", f"run_dir={tmp_path / 'run'}"]
    return prepare(read_recipe([*sets, *words]), World())


def training_batches(run) -> TrainingBatches:
    data, text = run.recipe.data, run.model.text
    decode = data.decode_config(
        frames="random" if run.model.image is not None else "none", frame_pixels=run.model.frame_pixels, random=True
    )
    tokenize = None if text is None or data.caption_features else text.tokenize
    return TrainingBatches(
        run.train_sets, run.plan, decode, seed=0, world=World(), tokenize=tokenize, features=run.train_features
    )


def damage(shards: str, shard: int, row: int, member: str) -> None:
    path = Path(shards) / f"{shard:05d}.tar"
    offset, num_bytes = load_shards(shards)[shard].index.span(row, member)
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * num_bytes)


def reader_of(shards: str, modality: str, name: str = "own", folder: str | None = None) -> FeatureReader:
    return FeatureReader(open_features(load_shards(shards), name, folder, {}, "own"), modality)


def test_every_row_holds_its_own_frames_and_captions(shards, tmp_path, run_embed):
    # Batches of four, where a shard has six rows.
    both = [*SMALL, "task=image-text"]
    run_embed(*both, f"shards={shards}", "batch_size=4", "features=own")
    frames, captions = reader_of(shards, "image"), reader_of(shards, "text")
    model = prepared(shards, tmp_path, *both).model
    members = ShardReader(load_shards(shards))
    for shard, row in np.ndindex(3, 6):
        pictures = [square_frame(members.read(shard, row, frame_member(number)), 64) for number in range(4)]
        text = ClipMetadata.from_json(members.read(shard, row, "json"), "").text
        with torch.no_grad():
            expected_LD = model.embed_images(torch.from_numpy(np.stack(pictures))).numpy()
            expected_CD = model.embed_text(model.text.tokenize(text)).numpy()
        np.testing.assert_allclose(frames.read(shard, row), expected_LD, atol=1e-6)
        np.testing.assert_allclose(captions.read(shard, row), expected_CD, atol=1e-6)
        assert np.ptp(expected_LD, axis=0).max() > 1e-3


@pytest.mark.parametrize(
    ("words", "key"), [(PICTURES, "frame_features"), (CAPTIONS, "caption_features")], ids=["frames", "captions"]
)
def test_a_run_with_features_sees_what_it_would_have_embedded(shards, tmp_path, run_embed, words, key):
    # Several epochs: the random frame and the drawn caption change.
    plain = prepared(shards, tmp_path, *words)
    wanted = list(map(training_batches(plain).__getitem__, range(9)))
    run_embed(*words, f"shards={shards}", "features=own")
    for shard, row, frame in np.ndindex(3, 6, 4):
        damage(shards, shard, row, frame_member(frame))
    known = prepared(shards, tmp_path, *words, f"data.{key}=own")
    for expected, batch in zip(
        wanted, iterate(training_batches(known), range(9), num_workers=1, device=CPU), strict=True
    ):
        assert not batch.bad_samples
        assert (batch.keys, batch.captions, batch.tokens_BC) == (expected.keys, expected.captions, None)
        torch.testing.assert_close(embedded(known, batch), embedded(plain, expected), atol=1e-6, rtol=0)
    if key == "frame_features":
        assert batch.frame_embeddings_BLD.shape == (4, 4, 128)
        assert {int(number) for one in wanted for number in one.frame_numbers_BL[:, 0]} == {0, 1, 2, 3}


@torch.no_grad()
def embedded(run, batch) -> tuple[torch.Tensor, torch.Tensor]:
    return run.model.eval()(model_inputs(batch))


def test_a_clip_that_could_not_be_embedded_is_replaced_in_training_and_refused_at_evaluation(
    shards, tmp_path, run_embed, capsys
):
    damage(shards, 1, 2, frame_member(3))
    run_embed(*PICTURES, f"shards={shards}", "features=own", "batch_size=4")
    assert "not embedded: clip-0008 of" in capsys.readouterr().err
    header = read_feature_file(f"{shards}/00001.own.safetensors").header
    assert list(header.missing) == ["2"]
    assert "3.jpg has changed" in header.missing["2"]
    run = prepared(shards, tmp_path, *PICTURES, "data.frame_features=own", f"data.validation.own.shards={shards}")
    batches = [training_batches(run)[step] for step in range(4)]
    bad = [sample for batch in batches for sample in batch.bad_samples]
    assert {sample.key for sample in bad} == {"clip-0008"}
    assert "not embedded (3.jpg has changed" in bad[0].reason
    assert bad[0].kind == "not_embedded"
    assert all(len(batch.keys) == 4 and "clip-0008" not in batch.keys for batch in batches)
    decode = run.recipe.data.decode_config(frames="middle", frame_pixels=64, random=False)
    evaluation = EvaluationBatches(
        run.validation_sets["own"], decode, world=World(), batch_size=18, features=run.validation_features["own"]
    )
    with pytest.raises(UserError, match=r"clip clip-0008 of .*00001.tar cannot be evaluated \(not embedded"):
        evaluation[0]


def test_a_set_in_which_too_much_does_not_decode_is_no_set(shards, run_embed):
    for row in range(10):
        damage(shards, row // 6, row % 6, frame_member(0))
    with pytest.raises(UserError, match=r"10 of \d+ clips do not decode, more than max_bad_share=0.01") as raised:
        run_embed(*PICTURES, f"shards={shards}", "features=own", "batch_size=4")
    # Another rank may not have met it: this one says so itself.
    assert not raised.value.on_every_rank


def test_an_embedding_that_is_not_finite_is_refused(shards, run_embed, monkeypatch):
    monkeypatch.setattr(embed, "build_towers", broken_towers)
    with pytest.raises(UserError, match="the image embedding of clip clip-0000 is not finite"):
        run_embed(*PICTURES, f"shards={shards}", "features=own")
    assert not list(Path(shards).glob("*.own.safetensors"))


def broken_towers(recipe):
    model = build_towers(recipe)
    with torch.no_grad():
        model.image.visual.proj.fill_(float("nan"))
    return model


@pytest.fixture(scope="module")
def embedded_set(tmp_path_factory):
    """A set with features, made by seed 0's random towers."""
    folder = tmp_path_factory.mktemp("embedded")
    shards = write_shards(folder / "set", [[clip(6 * shard + row) for row in range(6)] for shard in range(3)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["embed.py", *PICTURES, f"shards={shards}", "features=own"])
        embed.main()
    return Path(shards)


def another_shard(folder: Path) -> None:
    write_shards(folder, [[clip(40 + row) for row in range(6)]])


def a_copy_of_another_file(folder: Path) -> None:
    shutil.copy(folder / "00000.own.safetensors", folder / "00001.own.safetensors")


def a_missing_file(folder: Path) -> None:
    (folder / "00001.own.safetensors").unlink()


def a_file_cut_short(folder: Path) -> None:
    path = folder / "00002.own.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def a_file_of_something_else(folder: Path) -> None:
    save_file({"image": np.zeros((6, 4, 128), np.float32)}, folder / "00002.own.safetensors")


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        (None, [], None),
        (None, ["model.audio.stride_frames=16", "training.global_batch_size=6"], None),
        (None, ["training.seed=1"], "00000.own.safetensors was made by other weights of tiny-64"),
        (None, ["model.image.name=tiny-audio-32"], "by model tiny-64, not tiny-audio-32"),
        (None, ["data.num_frames=3"], "with num_frames=4, not 3"),
        (None, ["data.frame_features=other"], "data set 'own' has no 'other' features for 3 of 3 shards"),
        (None, ["data.train.own.features=/nowhere"], "has no 'own' features for 3 of 3 shards (/nowhere/00000.own"),
        (another_shard, [], "00000.own.safetensors was made of another content of 00000.tar"),
        (a_copy_of_another_file, [], "00001.own.safetensors was made of another content of 00001.tar"),
        (a_missing_file, [], "has no 'own' features for 1 of 3 shards"),
        (a_file_cut_short, [], "00002.own.safetensors is damaged"),
        (a_file_of_something_else, [], "00002.own.safetensors is damaged, or no feature file"),
        (None, ["model.image.frozen=false"], "data.frame_features=own is what the image tower said before"),
        (None, ["task=audio-text"], "data.frame_features=own says nothing to task=audio-text"),
    ],
)
def test_stale_features_are_refused_before_a_run_starts(embedded_set, tmp_path, change, words, message):
    folder = tmp_path / "set"
    shutil.copytree(embedded_set, folder)
    if change is not None:
        change(folder)
    words = [*PICTURES, "data.frame_features=own", *words]
    if message is None:
        assert prepared(str(folder), tmp_path, *words).train_features.frames is not None
        return
    with pytest.raises(UserError) as raised:
        prepared(str(folder), tmp_path, *words)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert any(mend in str(raised.value) for mend in ("launch/embed.py", "set to null", "set it to null", "=null"))


def test_a_second_job_keeps_what_is_finished_and_refuses_what_is_stale(embedded_set, tmp_path, run_embed, capsys):
    folder = tmp_path / "set"
    shutil.copytree(embedded_set, folder)
    words = [*PICTURES, f"shards={folder}", "features=own"]
    files = sorted(folder.glob("*.own.safetensors"))
    whole = [file.read_bytes() for file in files]
    files[1].unlink()
    kept = [file.stat().st_mtime_ns for file in files if file != files[1]]
    run_embed(*words)
    assert "made 1 files, 0 clips could not be embedded; 2 files were there already" in capsys.readouterr().out
    assert [file.stat().st_mtime_ns for file in files if file != files[1]] == kept
    assert [file.read_bytes() for file in files] == whole
    for changed, message in (
        (["training.seed=1"], "by other weights"),
        (["dtype=fp16"], "holds fp32 of image"),
        (["what=[image,audio]"], "without audio"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            run_embed(*words, *changed, rank=1, size=4)
        assert raised.value.on_every_rank
    assert [file.read_bytes() for file in files] == whole
    a_file_cut_short(folder)
    run_embed(*words, "training.seed=1", "overwrite=true")
    assert all(file.read_bytes() != before for file, before in zip(files, whole, strict=True))
    with pytest.raises(UserError, match="by other weights"):
        run_embed(*words)


def test_what_one_rank_alone_cannot_read_it_tells_itself(embedded_set, run_embed, monkeypatch):
    def unreadable(*_):
        raise UserError("cannot read 00000.own.safetensors (Input/output error)")

    monkeypatch.setattr("launch.embed.jobs_to_do", unreadable)
    with pytest.raises(UserError, match="cannot read") as raised:
        run_embed(*PICTURES, f"shards={embedded_set}", "features=own", "overwrite=true")
    assert not raised.value.on_every_rank


def test_half_precision_is_near_and_half_as_large(embedded_set, tmp_path, run_embed):
    run_embed(*PICTURES, f"shards={embedded_set}", "features=half", "dtype=fp16", f"out={tmp_path}")
    whole, half = reader_of(str(embedded_set), "image"), reader_of(str(embedded_set), "image", "half", str(tmp_path))
    for shard, row in np.ndindex(3, 6):
        assert half.read(shard, row).dtype == np.float32
        np.testing.assert_allclose(half.read(shard, row), whole.read(shard, row), atol=2e-4)
    tensors = load_file(tmp_path / "00000.half.safetensors")["image"]
    assert (tensors.dtype, tensors.shape) == (np.float16, (6, 4, 128))


def test_two_ranks_make_the_files_of_one(embedded_set, tmp_path, run_embed):
    out = tmp_path / "out"
    for rank in range(2):
        run_embed(*PICTURES, f"shards={embedded_set}", "features=own", f"out={out}", rank=rank, size=2)
    assert sorted(file.name for file in out.iterdir()) == [f"{shard:05d}.own.safetensors" for shard in range(3)]
    for file in out.iterdir():
        assert file.read_bytes() == (embedded_set / file.name).read_bytes()


def test_two_sets_of_a_recipe_cannot_share_their_files(embedded_set, tmp_path, run_embed):
    other = write_shards(tmp_path / "other", [[clip(0)]])
    sets = [f"data.train.a.shards={embedded_set}", f"data.train.b.shards={other}"]
    folders = [f"data.train.{name}.features={tmp_path / 'out'}" for name in "ab"]
    with pytest.raises(UserError, match=r"00000.tar and .*00000.tar would share .*out/00000.own.safetensors"):
        run_embed(*PICTURES, *sets, *folders, "features=own")


def test_features_of_a_recipe_that_names_them_are_made_from_the_pictures(shards, tmp_path, run_embed):
    words = [*PICTURES, f"data.train.own.shards={shards}", f"data.validation.own.shards={shards}"]
    words += [f"data.{part}.own.features={tmp_path / 'out'}" for part in ("train", "validation")]
    run_embed(*words, "data.frame_features=own", "features=own")
    run = prepare(read_recipe([*words, f"run_dir={tmp_path / 'run'}", "data.frame_features=own"]), World())
    assert np.ptp(run.train_features.frames.read(0, 0), axis=0).max() > 1e-3


def test_remote_features_are_copied_to_the_node_and_anew_when_they_changed(
    embedded_set, tmp_path, run_embed, monkeypatch
):
    monkeypatch.setenv("AUDIOTEXT_CACHE_DIR", str(tmp_path / "cache"))
    with server() as endpoint:
        use(monkeypatch, endpoint)
        fsspec.filesystem("s3").mkdir("features")
        for seed in (0, 1):
            job = [*PICTURES, f"shards={embedded_set}", f"training.seed={seed}"]
            run_embed(*job, "features=own", "out=s3://features/set", "overwrite=true")
            run_embed(*job, f"features=seed{seed}", f"out={tmp_path / 'local'}")
            remote = reader_of(str(embedded_set), "image", "own", "s3://features/set")
            local = reader_of(str(embedded_set), "image", f"seed{seed}", str(tmp_path / "local"))
            for shard in range(3):
                np.testing.assert_array_equal(remote.read(shard, 5), local.read(shard, 5))


def test_remote_features_are_fetched_ahead_like_shards(embedded_set, tmp_path, monkeypatch):
    monkeypatch.setenv("AUDIOTEXT_CACHE_DIR", str(tmp_path / "cache"))
    with server() as endpoint:
        use(monkeypatch, endpoint)
        fsspec.filesystem("s3").mkdir("ahead")
        fsspec.filesystem("s3").put(f"{embedded_set}/*.safetensors", "ahead/set/")
        words = [*PICTURES, "data.frame_features=own", "data.train.own.features=s3://ahead/set"]
        batches = training_batches(prepared(str(embedded_set), tmp_path, *words))
        first = batches[0].counts
        batches._prefetcher.wait_until_idle()
        later = ReadCounts()
        for step in range(1, 4):
            later += batches[step].counts
    num_bytes = sum(path.stat().st_size for path in embedded_set.glob("*.safetensors"))
    assert first.bytes_fetched + later.bytes_fetched == num_bytes
    assert first.cache_misses + later.cache_misses == 3
    assert later.prefetch_waits == 0
    assert later.cache_hits > 0


def test_remote_features_that_the_cache_removed_do_not_keep_its_disk(embedded_set, tmp_path, monkeypatch):
    monkeypatch.setenv("AUDIOTEXT_CACHE_DIR", str(tmp_path / "cache"))
    store = fsspec.filesystem("memory")
    for path in embedded_set.glob("*.safetensors"):
        store.pipe_file(f"/removed/{path.name}", path.read_bytes())
    words = [*PICTURES, "data.frame_features=own", "data.train.own.features=memory://removed"]
    batches = training_batches(prepared(str(embedded_set), tmp_path, *words))

    def removed_but_mapped() -> int:
        return sum(str(tmp_path) in line and "(deleted)" in line for line in Path("/proc/self/maps").open())

    batches[0]
    batches._prefetcher.wait_until_idle()
    for path in (tmp_path / "cache").glob("*.safetensors"):
        path.unlink()
    assert removed_but_mapped() > 0
    batches[1]
    assert removed_but_mapped() == 0


def test_remote_features_that_are_fetched_again_are_proved_again(embedded_set, tmp_path, monkeypatch):
    monkeypatch.setenv("AUDIOTEXT_CACHE_DIR", str(tmp_path))
    store = fsspec.filesystem("memory")
    for path in embedded_set.glob("*.safetensors"):
        store.pipe_file(f"/again/{path.name}", path.read_bytes())
    reader = reader_of(str(embedded_set), "image", "own", "memory://again")
    reader.read(0, 0)
    content = bytearray(store.cat_file("/again/00000.own.safetensors"))
    content[-1] ^= 1
    store.pipe_file("/again/00000.own.safetensors", bytes(content))
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    reader.close_removed()
    with pytest.raises(UserError, match=r"00000.own.safetensors is damaged"):
        reader.read(0, 0)


@pytest.mark.parametrize("change", [another_shard, a_missing_file, a_file_cut_short, a_file_of_something_else])
def test_of_a_large_set_those_files_that_were_not_looked_at_are_refused_where_they_are_read(
    embedded_set, tmp_path, monkeypatch, change
):
    folder = tmp_path / "set"
    shutil.copytree(embedded_set, folder)
    change(folder)
    monkeypatch.setattr("audiotext_dist.data.feature_files.NUM_CHECKED", 1)
    shards = load_shards(str(folder))
    monkeypatch.setattr("random.Random.sample", lambda _, files, number: [files[change is another_shard]])
    reader = FeatureReader(open_features(shards, "own", None, {}, "own"), "image")
    with pytest.raises(UserError, match=r"launch/embed\.py") as raised:
        [reader.read(shard, 0) for shard in range(3)]
    assert "\n" not in str(raised.value)


def test_a_sample_of_a_large_set_is_looked_at(embedded_set, tmp_path, monkeypatch):
    shutil.copytree(embedded_set, tmp_path / "set")
    for path in (tmp_path / "set").glob("*.own.safetensors"):
        path.unlink()
    monkeypatch.setattr("audiotext_dist.data.feature_files.NUM_CHECKED", 2)
    with pytest.raises(UserError, match="has no 'own' features for 2 of 2 shards"):
        open_features(load_shards(str(tmp_path / "set")), "own", None, {}, "own")


def test_a_flipped_bit_is_noticed_before_a_row_is_used_and_mended_as_is_told(embedded_set, tmp_path, run_embed, capsys):
    shutil.copytree(embedded_set, tmp_path / "set")
    path = tmp_path / "set" / "00001.own.safetensors"
    whole = path.read_bytes()
    content = bytearray(whole)
    content[-1] ^= 1
    path.write_bytes(content)
    reader = reader_of(str(tmp_path / "set"), "image")
    reader.read(0, 0)
    with pytest.raises(UserError, match=r"00001.own.safetensors is damaged \(its content has another checksum\)"):
        reader.read(1, 0)
    run_embed(*PICTURES, f"shards={tmp_path / 'set'}", "features=own", "overwrite=true")
    assert "made 1 files, 0 clips could not be embedded; 2 files were there already" in capsys.readouterr().out
    assert path.read_bytes() == whole


def test_a_file_that_changes_during_a_run_is_noticed(embedded_set, tmp_path, run_embed):
    folder = tmp_path / "set"
    shutil.copytree(embedded_set, folder)
    reader = reader_of(str(folder), "image")
    run_embed(*PICTURES, f"shards={folder}", "features=own", "training.seed=1", "overwrite=true")
    with pytest.raises(UserError, match="has another content than when the run began"):
        reader.read(0, 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["features=a.b"], "features=a.b cannot be part of a file's name"),
        (["features=own", "what=[text]"], "what=text: task=audio-image has no such tower"),
        (["features=own", "what=[pictures]"], "pictures"),
        (["features=own", "model.image.frozen=false"], "freezes no tower"),
        (["features=own", "out=/tmp/x"], "out= goes with shards="),
        (["features=own", "run=/nowhere"], "/nowhere is no run folder"),
        ([], "features=..."),
    ],
)
def test_wrong_words_are_one_line(embedded_set, run_embed, words, message):
    sets = [] if any(word.startswith("out=") for word in words) else [f"shards={embedded_set}"]
    with pytest.raises(UserError) as raised:
        run_embed(*PICTURES, *sets, *words)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
