"""What reading costs: ``python -m tests.bench.bench_reader [decode] [tar] [fbank] [plan] [resume] [memory]``

Each part prints a table in Markdown; without words all of them run. Real clips where they are at hand.

decode: CPU time a clip of this reader, of the bare decoders on the same bytes, and of stock pipelines; then clips a
second by the clock. tar: access to the members alone. fbank: filter banks of 64 clips on the device. plan: 100 M clips
in 400 k shards on 1,024 ranks. resume: the first batch of an epoch, and that of its last tenth. memory: a worker's
over 100,000 clips.

CPU time of all processes, where the clock is not named: other programs on the machine do not change it much.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import simplejpeg
import soundfile
import torch

from audiotext_dist.data.decode import FrameChoice
from audiotext_dist.data.loader import TrainingBatches
from audiotext_dist.data.plan import Plan
from audiotext_dist.data.sample import Sample, frame_member
from audiotext_dist.data.sets import DataConfig, SetConfig, make_plan, open_sets
from audiotext_dist.data.shard import Shard, load_shards
from audiotext_dist.data.shard_reader import ShardReader
from audiotext_dist.data.workers import iterate
from audiotext_dist.distributed import World
from shards.media import MediaConfig, try_clip
from shards.record import Record
from tests.bench import stock_pipelines
from tests.bench.bench_build import REAL_DATA
from tests.bench.passes import measure_passes
from tests.bench.reader_fbank import measure_fbank
from tests.bench.reader_scale import compare_starts, measure_plan
from tests.clips import write_shards

BATCH_SIZE = 64
SAMPLE_RATE_HZ = 32000
FRAME_PIXELS = 224
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One set of real clips, and what is taken of each."""

    title: str
    shards: str
    clip_seconds: float
    frames: FrameChoice = "none"

    @property
    def jpegs(self) -> list[str]:
        """The members that hold so many frames of a clip."""
        return {"none": [], "random": ["1.jpg"], "all": [frame_member(number) for number in range(4)]}[self.frames]

    @property
    def num_clips(self) -> int:
        """Clips of the set."""
        return sum(shard.num_samples for shard in load_shards(self.shards))


def main() -> None:
    """The parts that the words name."""
    torch.set_num_threads(1)
    parts: dict[str, Callable[[Path], None]] = {
        "decode": compare_decoding,
        "tar": compare_tar_access,
        "fbank": measure_fbank,
        "plan": measure_plan,
        "resume": compare_starts,
        "memory": measure_memory,
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[1:] or parts:
            print(f"\n{name}\n", flush=True)
            parts[name](Path(folder))


def cases(folder: Path) -> list[Case]:
    """Shards of real clips, built on first use; whole batches of each, so that no tail is dropped."""
    sound = sorted((REAL_DATA / "esc").rglob("*.ogg"))[: 6 * BATCH_SIZE]
    street = sorted((REAL_DATA / "urbansound8k").rglob("*.ogg"))[::5][: 6 * BATCH_SIZE]
    film = sorted((REAL_DATA / "av").rglob("*.mp4"))
    frames = MediaConfig(frame_short_side_pixels=FRAME_PIXELS)
    sounds = build(folder / "esc", sound, MediaConfig(num_frames=0))
    films = build(folder / "av", film, frames, copies=16)
    return [
        Case(title="ESC-50, 5 s", shards=sounds, clip_seconds=5),
        Case(
            title="UrbanSound8K, 4 s",
            shards=build(folder / "street", street, MediaConfig(num_frames=0)),
            clip_seconds=4,
        ),
        Case(title="VGGSound, 10 s and a frame", shards=films, clip_seconds=10, frames="random"),
        Case(title="VGGSound, 10 s and all 4 frames", shards=films, clip_seconds=10, frames="all"),
        Case(title="VGGSound, 3 s of 10 and a frame", shards=films, clip_seconds=3, frames="random"),
    ]


def build(out: Path, media: list[Path], config: MediaConfig, copies: int = 1) -> str:
    """A folder of shards with these clips, each as often as asked."""
    if not out.exists():
        found = [
            try_clip(Record(name=path.stem, media=path, recording="", captions=["a"]), config, "d") for path in media
        ]
        clips = [clip for clip in found if isinstance(clip, Sample)]
        copied = [replace(clip, key=f"{clip.key}-{copy}") for copy in range(copies) for clip in clips]
        write_shards(out, [copied[start : start + 60] for start in range(0, len(copied), 60)])
    return str(out)


def reader_batches(case: Case, num_workers: int, num_passes: int) -> Iterator[object]:
    """This reader over the whole set, some times."""
    data = DataConfig(
        train={"own": SetConfig(shards=case.shards)},
        sample_rate_hz=SAMPLE_RATE_HZ,
        clip_seconds=case.clip_seconds,
        num_lanes=16,
    )
    sets = open_sets(data.train, data, frames=case.frames != "none", captions=False)

    def plan_of(epoch: int) -> Plan:
        return make_plan(sets, data, seed=0, epoch=epoch, global_batch_size=BATCH_SIZE, world_size=1)

    decode = data.decode_config(frames=case.frames, frame_pixels=FRAME_PIXELS, random=True)
    batches = TrainingBatches(sets, plan_of, decode, seed=0, world=World(), tokenize=None)
    steps = range(num_passes * plan_of(0).num_batches)
    return iterate(batches, steps, num_workers=num_workers, device=CPU)


def encoded_clips(case: Case) -> list[tuple[bytes, list[bytes]]]:
    """(FLAC, JPEGs) of every clip, in memory."""
    shards = load_shards(case.shards)
    with contextlib.closing(ShardReader(shards)) as reader:
        return [
            (reader.read(shard, row, "flac"), [reader.read(shard, row, jpeg) for jpeg in case.jpegs])
            for shard, found in enumerate(shards)
            for row in range(found.num_samples)
        ]


def decode_bare(clips: list[tuple[bytes, list[bytes]]], num_samples: int, num_passes: int) -> None:
    """soundfile and simplejpeg on the same bytes, and nothing else."""
    random = np.random.default_rng(0)
    for _ in range(num_passes):
        for flac, jpegs in clips:
            with soundfile.SoundFile(io.BytesIO(flac)) as file:
                if surplus := max(file.frames - num_samples, 0):
                    file.seek(int(random.integers(surplus + 1)))
                file.read(num_samples, dtype="int16")
            for jpeg in jpegs:
                simplejpeg.decode_jpeg(jpeg, colorspace="RGB")


def decode_bare_in_two(clips: list[tuple[bytes, list[bytes]]], num_samples: int, num_passes: int) -> None:
    """The same in two processes, half of the clips each."""
    halves = [clips[::2], clips[1::2]]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=decode_bare, args=(half, num_samples, num_passes)) for half in halves]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def exhaust(make: Callable[[], Iterator[object]]) -> None:
    """Read to the end, and let the workers go."""
    for _ in make():
        pass


def compare_decoding(folder: Path) -> None:
    """Milliseconds of CPU a clip, without workers and with two; then clips a second by the clock, with two."""
    by_the_clock = list[str]()
    print("| clips | workers | bare | reader | reader / bare | webdataset | x | CLAP style | x | spread |")
    print("|---" * 10 + "|", flush=True)
    for case in cases(folder):
        clips, num_samples = encoded_clips(case), round(case.clip_seconds * SAMPLE_RATE_HZ)
        for num_workers in (0, 2):
            bare = decode_bare_in_two if num_workers else decode_bare
            contenders: list[Callable[[int], None]] = [
                partial(bare, clips, num_samples),
                lambda passes, case=case, num=num_workers: exhaust(lambda: reader_batches(case, num, passes)),  # type: ignore[misc]
                *(
                    lambda passes, case=case, num=num_workers, style=style: exhaust(  # type: ignore[misc]
                        lambda: stock_pipelines.batches(case.shards, style, case.clip_seconds, case.jpegs, num, passes)
                    )
                    for style in ("webdataset", "clap")
                ),
            ]
            used, clock = measure_passes(contenders)
            bare, reader, stock, clap = (1000 * seconds / len(clips) for seconds in used.a_pass)
            print(
                f"| {case.title} | {num_workers} | {bare:.2f} | {reader:.2f} | {reader / bare:.2f} | {stock:.2f} "
                f"| {stock / reader:.2f} | {clap:.2f} | {clap / reader:.2f} | {used.spread:.0%} |",
                flush=True,
            )
            bare, reader, stock, clap = (len(clips) / seconds for seconds in clock.a_pass)
            if num_workers:
                by_the_clock.append(
                    f"| {case.title} | {bare:.0f} | {reader:.0f} | {reader / bare:.2f} | {stock:.0f} "
                    f"| {reader / stock:.2f} | {clap:.0f} | {reader / clap:.2f} | {clock.spread:.0%} |"
                )
    print("\nClips a second by the clock, two processes each:\n")
    print("| clips | bare | reader | reader / bare | webdataset | x | CLAP style | x | spread |")
    print("|---" * 9 + "|", *by_the_clock, sep="\n", flush=True)


def compare_tar_access(folder: Path) -> None:
    """The bytes of every sample's members, samples a CPU second; and of those that a training step takes."""
    print("| clips | KB read | pread alone | reader, in the plan's order | webdataset, all members | x | spread |")
    print("|---" * 7 + "|", flush=True)
    sound, street, film, all_frames, _ = cases(folder)
    everything = ["flac", "json", *(f"{number}.jpg" for number in range(4))]
    for case, title, members in (
        (sound, sound.title, everything[:2]),
        (street, street.title, everything[:2]),
        (all_frames, all_frames.title, everything),
        (film, film.title, everything[:3]),
    ):
        shards = load_shards(case.shards)
        raw = partial(read_in_place, shards, members)
        reads = partial(read_members, shards, members)
        parses = partial(stock_pipelines.members, case.shards)
        # One pass is too short to be measured.
        contenders = [lambda n, make=make: exhaust(lambda: make(5 * n)) for make in (raw, reads, parses)]  # type: ignore[misc]
        used, _ = measure_passes(contenders)
        bound, ours, theirs = (5 * case.num_clips / each for each in used.a_pass)
        lengths = [shard.index.members[member][:, 1].sum() for shard in shards for member in members]
        kilobytes = sum(lengths) / case.num_clips / 1000
        speeds = f"{bound:,.0f} | {ours:,.0f} | {theirs:,.0f} | {ours / theirs:.1f} | {used.spread:.0%}"
        print(f"| {title} | {kilobytes:.0f} | {speeds} |", flush=True)


def read_in_place(shards: list[Shard], members: list[str], num_passes: int) -> Iterator[bytes]:
    """These members of every sample, in the tar's order, by nothing but the system's call: the bound."""
    for _, shard in itertools.product(range(num_passes), shards):
        descriptor = os.open(shard.path, os.O_RDONLY)
        spans = np.stack([shard.index.members[member][:, :2] for member in members], axis=1).reshape(-1, 2)
        for offset, num_bytes in spans.tolist():
            yield os.pread(descriptor, num_bytes, offset)
        os.close(descriptor)


def read_members(shards: list[Shard], members: list[str], num_passes: int) -> Iterator[bytes]:
    """These members of every sample, in the plan's order."""
    sizes = [[shard.num_samples for shard in shards]]
    with contextlib.closing(ShardReader(shards)) as reader:
        for epoch in range(num_passes):
            plan = Plan(
                set_sizes=sizes,
                set_weights=[1.0],
                seed=0,
                epoch=epoch,
                global_batch_size=64,
                num_lanes=8,
                window_shards=4,
            )
            for number in range(plan.num_batches):
                for slot in plan.batch(number):
                    for member in members:
                        yield reader.read(slot.shard, slot.row, member)


def measure_memory(folder: Path) -> None:
    """A worker's own memory while it reads 100,000 clips, over many epochs of one set."""
    case = replace(cases(folder)[0], clip_seconds=0.5)
    num_passes = 1 + 100_000 // case.num_clips
    batches = reader_batches(case, 1, num_passes)
    next(batches)
    (worker,) = (each for each in psutil.Process().children() if each.is_running())
    total, mb = num_passes * (case.num_clips // BATCH_SIZE), list[str]()
    print("| clips read | " + " | ".join(f"{tenth * 10_000:,}" for tenth in range(1, 10)) + " |")
    print("|---" * 10 + "|")
    for number, _ in enumerate(batches, 2):
        if (tenths := number * 10 // total) > (number - 1) * 10 // total and tenths < 10:
            mb.append(f"{worker.memory_full_info().uss / 1e6:.1f}")
    print("| the worker's own memory, MB | " + " | ".join(mb) + " |", flush=True)


if __name__ == "__main__":
    main()
