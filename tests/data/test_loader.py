"""Batches from real shards: contents, and randomness that belongs to clips."""

import dataclasses
import io
import multiprocessing
import os
import re
import signal
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from audiotext_dist.data.decode import clip_uniforms, decode_clip
from audiotext_dist.data.index import index_path
from audiotext_dist.data.loader import EvaluationBatches, TrainingBatches
from audiotext_dist.data.plan import Slot
from audiotext_dist.data.sample import AUDIO_MEMBER
from audiotext_dist.data.sets import DataConfig, SetConfig, make_plan, open_sets
from audiotext_dist.data.shard import load_shards
from audiotext_dist.data.shard_reader import ShardReader
from audiotext_dist.data.workers import iterate
from audiotext_dist.distributed import World
from audiotext_dist.errors import UserError, run_for_people
from tests.clips import FRAME_PIXELS, SAMPLE_RATE_HZ, make_sample, write_shards

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return write_shards(folder, [[make_sample(8 * shard + row) for row in range(8)] for shard in range(4)])


def config(shards: str, **changes) -> DataConfig:
    settings = {"sample_rate_hz": SAMPLE_RATE_HZ, "clip_seconds": 0.5, "num_workers": 0, "num_lanes": 4}
    return DataConfig(train={"own": SetConfig(shards=shards)}, **{**settings, **changes})


def training_batches(data: DataConfig, world: World, batch_size: int = 8) -> TrainingBatches:
    sets = open_sets(data.train, data, frames=True, captions=True)
    plan_of = partial(_plan, sets, data, batch_size, world.size)
    decode = data.decode_config(frames="random", frame_pixels=FRAME_PIXELS, random=True)
    return TrainingBatches(sets, plan_of, decode, seed=1, world=world, tokenize=None)


def _plan(sets, data, batch_size, world_size, epoch):
    return make_plan(sets, data, seed=1, epoch=epoch, global_batch_size=batch_size, world_size=world_size)


def epoch_of(batches, epoch=0, num_batches=4, num_workers=0):
    return list(iterate(batches, range(4 * epoch, 4 * epoch + num_batches), num_workers=num_workers, device=CPU))


def damage(folder: Path, shard: int, row: int, member: str, content: bytes | None = None) -> None:
    """Overwrite a member's bytes in place: same size, other content."""
    path = folder / f"{shard:05d}.tar"
    span = load_shards(str(folder))[shard].index.span(row, member)
    assert span is not None
    offset, num_bytes = span
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write((content or b"\xff" * num_bytes)[:num_bytes])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_and_workers_see_the_same_clips_crops_frames_and_captions(shards, num_workers):
    alone = epoch_of(training_batches(config(shards), World()))
    ranks = [
        epoch_of(training_batches(config(shards), World(rank=rank, size=2)), num_workers=num_workers)
        for rank in range(2)
    ]
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert whole.keys == [key for part in parts for key in part.keys]
        assert whole.captions == [caption for part in parts for caption in part.captions]
        for name in ("waveform_BS", "frames_BLHWC", "mask_uniforms_B4", "num_valid_samples_B"):
            torch.testing.assert_close(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_batch_that_is_kept_stays_as_it_is(shards, num_workers):
    """Workers use their shared memory again."""
    steps = range(24)
    kept = list(iterate(training_batches(config(shards), World()), steps, num_workers=num_workers, device=CPU))
    for batch, alone in zip(kept, map(training_batches(config(shards), World()).__getitem__, steps), strict=True):
        assert torch.equal(batch.waveform_BS, alone.waveform_BS)
        assert torch.equal(batch.frames_BLHWC, alone.frames_BLHWC)


def mixed(shards: str, tmp_path: Path) -> DataConfig:
    """Two sets: the shards with weight 1, and ten clips of their own with weight 2.5."""
    other = write_shards(tmp_path / "other", [[make_sample(100 + row) for row in range(5)] for _ in range(2)])
    sets = {"own": SetConfig(shards=shards), "other": SetConfig(shards=other, weight=2.5)}
    return dataclasses.replace(config(shards), train=sets)


def read_on_ranks(data, steps, size, num_workers):
    """Keys, captions and sounds of the global batches of these steps."""
    ranks = [
        iterate(training_batches(data, World(rank=rank, size=size)), steps, num_workers=num_workers, device=CPU)
        for rank in range(size)
    ]
    return [
        (
            [key for part in parts for key in part.keys],
            [caption for part in parts for caption in part.captions],
            torch.cat([part.waveform_BS for part in parts]),
        )
        for parts in zip(*ranks, strict=True)
    ]


@pytest.fixture(scope="module")
def two_epochs(shards, tmp_path_factory):
    """A mixture, and its global batches as one process without workers reads them: 7 of 8 in each epoch of 57 clips."""
    data = mixed(shards, tmp_path_factory.mktemp("mixed"))
    whole = read_on_ranks(data, range(14), 1, 0)
    assert [keys for keys, *_ in whole[:7]] != [keys for keys, *_ in whole[7:]]
    return data, whole


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@settings(deadline=None, max_examples=6)
@given(
    stopped_at=st.integers(0, 14),
    before=st.tuples(st.sampled_from([1, 2, 4]), st.integers(0, 4)),
    after=st.tuples(st.sampled_from([1, 2, 4]), st.integers(0, 4)),
)
def test_a_run_goes_on_from_any_batch_on_other_ranks_and_workers(two_epochs, stopped_at, before, after):
    data, whole = two_epochs
    found = read_on_ranks(data, range(stopped_at), *before) + read_on_ranks(data, range(stopped_at, 14), *after)
    assert len(found) == 14
    for (keys, captions, waveforms), (other_keys, other_captions, other_waveforms) in zip(found, whole, strict=True):
        assert (keys, captions) == (other_keys, other_captions)
        assert torch.equal(waveforms, other_waveforms)


def test_random_choices_change_from_epoch_to_epoch(shards):
    batches = training_batches(config(shards), World())
    by_key = [
        {
            key: (caption, float(mask[0]), wave[:8].tolist(), int(frame[0, 0, 0, 0]))
            for batch in epoch_of(batches, epoch)
            for key, caption, mask, wave, frame in zip(
                batch.keys, batch.captions, batch.mask_uniforms_B4, batch.waveform_BS, batch.frames_BLHWC, strict=True
            )
        }
        for epoch in range(2)
    ]
    assert by_key[0].keys() == by_key[1].keys()
    for part in range(4):
        assert any(by_key[0][key][part] != by_key[1][key][part] for key in by_key[0])


def test_a_clip_keeps_its_sound_caption_and_frames(shards):
    for batch in epoch_of(training_batches(config(shards, clip_seconds=1.5), World())):
        for place, key in enumerate(batch.keys):
            number = int(key.removeprefix("clip-"))
            assert batch.captions[place] in (f"sound {number}", f"tone number {number}")
            assert batch.num_valid_samples_B[place] == SAMPLE_RATE_HZ
            spectrum = np.abs(np.fft.rfft(batch.waveform_BS[place, :SAMPLE_RATE_HZ].double().numpy()))
            assert spectrum.argmax() == 200 + 37 * number
            assert not batch.waveform_BS[place, SAMPLE_RATE_HZ:].any()
            assert abs(int(batch.frames_BLHWC[place, 0, 8, 8, 0]) - number) % 40 in (0, 1, 39)


def test_evaluation_takes_the_start_the_middle_frame_and_every_clip(shards):
    data = config(shards)
    decode = data.decode_config(frames="middle", frame_pixels=FRAME_PIXELS, random=False)
    found = [
        batch
        for rank in range(3)
        for batch in _all(EvaluationBatches(load_shards(shards), decode, world=World(rank=rank, size=3), batch_size=4))
    ]
    assert sorted(key for batch in found for key in batch.keys) == [f"clip-{number:04d}" for number in range(32)]
    for batch in found:
        assert (batch.waveform_BS[:, 0] == 0).all()
        for place, key in enumerate(batch.keys):
            assert abs(int(batch.frames_BLHWC[place, 0, 8, 8, 0]) - 80 - int(key.removeprefix("clip-"))) <= 1


def _all(batches):
    return iterate(batches, range(len(batches)), num_workers=0, device=CPU)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_set_in_which_nothing_decodes_ends_in_one_line(tmp_path, num_workers):
    folder = Path(write_shards(tmp_path, [[make_sample(row, num_frames=1) for row in range(8)]]))
    for row in range(8):
        damage(folder, shard=0, row=row, member=AUDIO_MEMBER)
    with pytest.raises(UserError, match="samples in a row cannot be used") as caught:
        epoch_of(training_batches(config(str(folder), num_frames=1), World()), num_workers=num_workers, num_batches=1)
    assert "\n" not in str(caught.value)


def test_clips_of_no_dataset_and_of_equal_keys_have_draws_of_their_own(tmp_path):
    def uniforms(dataset):
        """Of the clip with number 0 in each of two shards that differ in their second clip."""
        folder = tmp_path / (dataset or "none")
        first = make_sample(0, num_frames=0)
        first = dataclasses.replace(first, metadata=dataclasses.replace(first.metadata, dataset=dataset))
        write_shards(folder, [[first, make_sample(number, num_frames=0)] for number in (1, 2)])
        decode = config("x").decode_config(frames="none", frame_pixels=0, random=True)
        reader = ShardReader(load_shards(str(folder)))
        slots = [Slot(shard=shard, row=0) for shard in (0, 1)]
        return [decode_clip(reader, first.key, slot, decode, seed=1, epoch=2).mask_uniforms.tolist() for slot in slots]

    one, other = uniforms("")
    assert one != other
    named = clip_uniforms(1, 2, 0, "clotho", make_sample(0).key)[3:].tolist()
    assert uniforms("clotho") == [named, named]


def test_of_a_sound_with_several_channels_the_first_is_heard(tmp_path):
    channels_SC = np.stack([np.arange(8000), -np.arange(8000)], axis=1).astype(np.int16)
    flac = io.BytesIO()
    soundfile.write(flac, channels_SC, SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16")
    folder = write_shards(tmp_path, [[dataclasses.replace(make_sample(0, num_frames=0), flac=flac.getvalue())]])
    decode = dataclasses.replace(config("x").decode_config(frames="none", frame_pixels=0, random=False), clip_seconds=1)
    clip = decode_clip(ShardReader(load_shards(folder)), "clip-0000", Slot(shard=0, row=0), decode, seed=0, epoch=0)
    assert clip.waveform.tolist() == list(range(8000))


class _OneIsBusy:
    """Worker 1 is busy with its first batch for longer than the test; as soon as it is, worker 0 has one, or fails."""

    def __init__(self, batches, fails):
        self.batches, self.memory, self.fails = batches, batches.memory, fails
        self.is_busy = multiprocessing.get_context("fork").Event()

    def __getitem__(self, number):
        if number:
            self.is_busy.set()
            threading.Event().wait(120)
        assert self.is_busy.wait(60)
        if self.fails:
            raise UserError("shard 7 is out of reach")
        return self.batches[number]


def _end_while_one_is_busy(batches):
    made = iterate(batches, range(8), num_workers=2, device=CPU)
    next(made)
    raise UserError("another rank has met one")


@pytest.mark.parametrize("fails", [True, False], ids=["in a worker", "in the main process"])
def test_an_error_ends_the_process_while_a_worker_is_busy(shards, fails):
    batches = _OneIsBusy(training_batches(config(shards), World()), fails)
    process = multiprocessing.get_context("fork").Process(target=_end_while_one_is_busy, args=(batches,))
    process.start()
    process.join(60)
    try:
        assert process.exitcode == 1
    finally:
        process.kill()


def test_a_worker_that_is_killed_ends_the_run_in_one_line(shards, monkeypatch, capsys):
    # As the kernel does where memory runs out.
    monkeypatch.setattr(TrainingBatches, "_own_slots", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    batches = training_batches(config(shards), World())
    with pytest.raises(SystemExit) as ended:
        run_for_people(lambda: epoch_of(batches, num_workers=1))
    assert ended.value.code == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert re.match(r"error: DataLoader worker \(pid.*data\.num_workers", told)


def test_a_task_without_sound_decodes_none(tmp_path):
    folder = Path(write_shards(tmp_path, [[make_sample(row) for row in range(4)]]))
    damage(folder, shard=0, row=2, member=AUDIO_MEMBER)
    decode = config(str(folder)).decode_config(audio=False, frames="all", frame_pixels=FRAME_PIXELS, random=False)
    (batch,) = _all(EvaluationBatches(load_shards(str(folder)), decode, world=World(), batch_size=4))
    assert batch.waveform_BS.shape == (4, 0)
    assert batch.frames_BLHWC.shape == (4, 4, FRAME_PIXELS, FRAME_PIXELS, 3)


def test_evaluation_names_a_clip_that_does_not_decode(tmp_path):
    folder = Path(write_shards(tmp_path, [[make_sample(row) for row in range(4)]]))
    damage(folder, shard=0, row=2, member=AUDIO_MEMBER)
    decode = config(str(folder)).decode_config(frames="none", frame_pixels=0, random=False)
    with pytest.raises(UserError, match="clip-0002"):
        list(_all(EvaluationBatches(load_shards(str(folder)), decode, world=World(), batch_size=4)))


def test_a_tar_without_an_index_is_scanned(tmp_path, shards):
    folder = Path(write_shards(tmp_path, [[make_sample(row) for row in range(8)]]))
    Path(index_path(str(folder / "00000.tar"))).unlink()
    scanned, written = load_shards(str(folder))[0].index, load_shards(shards)[0].index
    assert (scanned.keys, scanned.recordings) == (written.keys, written.recordings)
    assert scanned.sha256 == written.sha256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_rate_hz": 16000}, "built at 8000 Hz"),
        ({"num_frames": 6}, r"no 4.jpg, 5.jpg"),
    ],
)
def test_sets_that_do_not_fit_the_recipe_are_named(shards, changes, message):
    data = dataclasses.replace(config(shards), **changes)
    with pytest.raises(UserError, match=f"data set 'own'.*{message}"):
        open_sets(data.train, data, frames=True, captions=True)


def test_a_clip_without_a_caption_is_no_pair(tmp_path):
    mute = [make_sample(row, captions=[] if row % 8 == 5 else None) for row in range(32)]
    data = config(write_shards(tmp_path, [mute[:16], mute[16:]]), num_frames=4)
    batches = training_batches(data, World())
    batches._tokenize = lambda captions: torch.zeros(len(captions), 1)
    found = epoch_of(batches)
    assert {sample.kind for batch in found for sample in batch.bad_samples} == {"no_caption"}
    assert all(caption for batch in found for caption in batch.captions)


def test_the_copies_of_a_weighted_clip_are_drawn_anew(tmp_path):
    data = config(write_shards(tmp_path, [[make_sample(row) for row in range(8)]]))
    data = dataclasses.replace(data, train={"own": dataclasses.replace(data.train["own"], weight=2.0)})
    masks = {}
    for batch in epoch_of(training_batches(data, World()), num_batches=2):
        for key, mask in zip(batch.keys, batch.mask_uniforms_B4.tolist(), strict=True):
            masks.setdefault(key, []).append(tuple(mask))
    assert all(len(found) == 2 and found[0] != found[1] for found in masks.values())


def test_the_copies_of_a_clip_show_each_of_its_captions_once(tmp_path):
    samples = [make_sample(row, captions=[f"{row} said {n} times" for n in range(5)]) for row in range(8)]
    data = config(write_shards(tmp_path, [samples]))
    data = dataclasses.replace(data, train={"own": dataclasses.replace(data.train["own"], weight=5.0)})
    batches = training_batches(data, World())
    firsts = set()
    for epoch in range(3):
        found = [(key, caption) for n in range(5) for key, caption in _drawn(batches[5 * epoch + n])]
        assert sorted(found) == sorted((sample.key, text) for sample in samples for text in sample.metadata.text)
        firsts.add(dict(reversed(found))["clip-0000"])
    assert len(firsts) > 1


def _drawn(batch):
    return zip(batch.keys, batch.captions, strict=True)


def test_an_unfinished_shard_of_a_build_is_refused(tmp_path):
    folder = Path(write_shards(tmp_path, [[make_sample(row)] for row in range(2)]))
    (folder / "00001.index.json").unlink()
    assert len(load_shards(str(folder))) == 2
    (folder / "build.json").write_text("{}")
    with pytest.raises(UserError, match=r"00001\.tar is not finished"):
        load_shards(str(folder))


def test_the_index_of_another_shard_is_refused(tmp_path):
    folder = Path(write_shards(tmp_path, [[make_sample(row)] for row in range(2)]))
    (folder / "00001.index.json").write_bytes((folder / "00000.index.json").read_bytes())
    with pytest.raises(UserError, match=r"is that of 00000\.tar"):
        load_shards(str(folder))


def test_a_reader_closes_its_files(shards):
    def open_files():
        return len(list(Path("/proc/self/fd").iterdir()))

    before = open_files()
    for _ in range(3):
        epoch_of(training_batches(config(shards), World()))
    assert open_files() <= before + 1


def test_a_set_without_captions_or_without_files_is_named(tmp_path):
    write_shards(tmp_path / "mute", [[make_sample(0, captions=[])]])
    data = config(str(tmp_path / "mute"))
    with pytest.raises(UserError, match="data set 'own' has no captions"):
        open_sets(data.train, data, frames=True, captions=True)
    data = config(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"data set 'own': no \*.tar files at .*nowhere"):
        open_sets(data.train, data, frames=True, captions=True)


def test_a_clips_random_numbers_are_uniform_and_its_own():
    drawn = np.stack([clip_uniforms(1, epoch, 0, "d", f"k{n}") for epoch in range(4) for n in range(2000)])
    assert drawn.shape == (8000, 7)
    assert drawn.min() >= 0
    assert drawn.astype(np.float32).max() < 1
    # Five standard deviations: of the share in each tenth, and of the correlation of any two numbers.
    shares = np.stack([np.histogram(column, 10, (0, 1))[0] / 8000 for column in drawn.T])
    assert np.abs(shares - 0.1).max() < 5 * np.sqrt(0.09 / 8000)
    assert np.abs(np.corrcoef(drawn.T) - np.eye(7)).max() < 5 / np.sqrt(8000)
    arguments = [
        (1, 0, 0, "d", "k"),
        (2, 0, 0, "d", "k"),
        (1, 1, 0, "d", "k"),
        (1, 0, 1, "d", "k"),
        (1, 0, 0, "e", "k"),
    ]
    assert len({tuple(clip_uniforms(*each)) for each in arguments}) == 5
    # The same numbers on every machine, now and later.
    assert (clip_uniforms(1, 2, 0, "d", "k")[:3] * 2**24).tolist() == [814669, 9677373, 9389615]
