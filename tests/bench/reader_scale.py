"""What a set of 100 M clips costs a rank: parts ``plan`` and ``resume`` of ``bench_reader.py``."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from audiotext_dist.data.loader import TrainingBatches
from audiotext_dist.data.plan import Plan
from audiotext_dist.data.sets import DataConfig, SetConfig, make_plan, open_sets
from audiotext_dist.data.shard import load_shards
from audiotext_dist.data.shard_list import list_row, write_list
from audiotext_dist.data.workers import iterate
from audiotext_dist.distributed import World
from tests.clips import make_sample, write_shards

NUM_LISTED, CLIPS_A_SHARD = 400_000, 250
GLOBAL_BATCH_SIZE, NUM_LANES, WORLD = 32_768, 1024, World(rank=77, size=1024)
MAX_LINKS = 60_000  # names of one file that a disk allows
CPU = torch.device("cpu")


class Stopwatch:
    """CPU time, the clock and this process's memory since it was made."""

    def __init__(self) -> None:
        self._mb, self._cpu, self._clock = _own_mb(), time.process_time(), time.perf_counter()

    def show(self, what: str) -> None:
        """A row of the table."""
        cpu_seconds, seconds = time.process_time() - self._cpu, time.perf_counter() - self._clock
        print(f"| {what} | {cpu_seconds:.2f} | {seconds:.2f} | {_own_mb() - self._mb:.0f} |", flush=True)


def _own_mb() -> float:
    return psutil.Process().memory_full_info().uss / 1e6


def measure_plan(folder: Path) -> None:
    """100 M clips in 400 k shards on 1,024 ranks; each part in a process of its own."""
    print("| what | CPU seconds | seconds by the clock | MB |\n|---|---|---|---|", flush=True)
    for name in ("plan_of_a_rank", "open_a_large_set"):
        code = f"from {__name__} import {name}; {name}({str(folder)!r})"
        subprocess.run([sys.executable, "-c", code], check=True)


def large_plan() -> Plan:
    """The order of such a set."""
    return Plan(
        set_sizes=[[CLIPS_A_SHARD] * NUM_LISTED],
        set_weights=[1.0],
        seed=0,
        epoch=0,
        global_batch_size=GLOBAL_BATCH_SIZE,
        num_lanes=NUM_LANES,
        window_shards=4,
    )


def plan_of_a_rank(_: str) -> None:
    """Make the plan, then one rank's batches."""
    watch = Stopwatch()
    plan = large_plan()
    watch.show(f"plan of {NUM_LISTED * CLIPS_A_SHARD:,} clips")
    for number in range(plan.num_batches):
        plan.batch(number, rank=WORLD.rank, world_size=WORLD.size)
    watch.show(f"and a rank's batches of a whole epoch, {plan.num_batches:,}")


def open_a_large_set(folder: str) -> None:
    """From ``open_sets`` to the first batch of one of 1,024 ranks, over a set with a list of its shards.

    The tars are a few under many names, all of the same clips; indexes are written where the rank will look for one.
    """
    out = Path(folder) / "large"
    write_shards(out, [[replace(make_sample(row % 100), key=f"clip-{row}") for row in range(CLIPS_A_SHARD)]])
    index = load_shards(str(out))[0].index
    tar, stored = out / index.shard_name, (out / "00000.index.json").read_bytes()
    rows = []
    for number in range(NUM_LISTED):
        name = f"{number:06d}.tar"
        if number % MAX_LINKS == 0:
            copy = out / name
            copy.write_bytes(tar.read_bytes())
        else:
            (out / name).hardlink_to(copy)
        own = stored.replace(b"00000.tar", name.encode())
        rows.append({**list_row(index, own), "name": name})
    for number in {slot.shard for slot in large_plan().batch(0, rank=WORLD.rank, world_size=WORLD.size)}:
        name = f"{number:06d}"
        (out / f"{name}.index.json").write_bytes(stored.replace(b"00000.tar", f"{name}.tar".encode()))
    tar.unlink()
    write_list(str(out), rows)
    del rows
    gc.collect()
    data = DataConfig(
        train={"own": SetConfig(shards=str(out))}, sample_rate_hz=8000, clip_seconds=1, num_lanes=NUM_LANES
    )

    watch = Stopwatch()
    sets = open_sets(data.train, data, frames=True, captions=True)
    watch.show(f"open the set of {NUM_LISTED:,} shards")

    def plan_of(epoch: int) -> Plan:
        return make_plan(sets, data, seed=0, epoch=epoch, global_batch_size=GLOBAL_BATCH_SIZE, world_size=WORLD.size)

    decode = data.decode_config(frames="random", frame_pixels=16, random=True)
    batches = TrainingBatches(sets, plan_of, decode, seed=0, world=WORLD, tokenize=None)
    batch = batches[0]
    watch.show(f"and its first batch of a rank, {len(batch.keys)} clips")


def compare_starts(folder: Path) -> None:
    """The first batch of 1 M clips, from step 0 and from 90 per cent, with two workers; best of three."""
    (shard,) = load_shards(write_shards(folder / "small", [[make_sample(row, num_frames=0) for row in range(250)]]))
    data = DataConfig(train={"own": SetConfig(shards=str(folder / "small"))}, sample_rate_hz=8000, clip_seconds=1)
    shards = [shard] * 4000

    def plan_of(epoch: int) -> Plan:
        return make_plan([shards], data, seed=0, epoch=epoch, global_batch_size=256, world_size=1)

    def first_batch(step: int) -> float:
        start = time.perf_counter()
        decode = data.decode_config(frames="none", frame_pixels=0, random=True)
        batches = TrainingBatches([shards], plan_of, decode, seed=0, world=World(), tokenize=None)
        next(iterate(batches, range(step, plan_of(0).num_batches), num_workers=2, device=CPU))
        return time.perf_counter() - start

    print("| first batch of 1,000,000 clips | seconds |\n|---|---|")
    num_batches = plan_of(0).num_batches
    for title, step in (("from step 0", 0), (f"from step {num_batches * 9 // 10}", num_batches * 9 // 10)):
        print(f"| {title} of {num_batches} | {min(first_batch(step) for _ in range(3)):.2f} |", flush=True)
