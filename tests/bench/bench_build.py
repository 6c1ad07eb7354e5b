"""What a shard build costs: ``python -m tests.bench.bench_build [memory.png]``

1. CPU seconds a clip of ``python -m shards.build``, its start apart: a long build minus a short one.
2. The same clips decoded and encoded in one process, without tar, index, report or workers.
3. One ffmpeg process for each sound and each frame, where ffmpeg is found.
4. With a file name: the memory of each worker over 10,000 clips, as a picture.

CPU time, not the clock: other programs on the machine do not change it much.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path

import psutil

from audiotext_dist.data.sample import Sample
from shards.media import MediaConfig, frame_times, try_clip
from shards.record import Record

REAL_DATA = Path(__file__).parents[3] / "shared" / "data"
NUM_WORKERS = 2
NUM_ROUNDS = 4
PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h


def main() -> None:
    print("clips per CPU second           build    bare   ffmpeg   build/bare   build/ffmpeg", flush=True)
    film = sorted((REAL_DATA / "av").rglob("*.mp4"))
    sound = sorted((REAL_DATA / "esc").rglob("*.ogg"))
    compare("20 films, sound and 4 frames", film, MediaConfig(), num_rows=160)
    compare("720 sounds of 5 s", sound, MediaConfig(num_frames=0), num_rows=2880)
    if sys.argv[1:]:
        draw_memory(Path(sys.argv[1]), sound, num_rows=10_000)


def compare(title: str, media: list[Path], config: MediaConfig, num_rows: int) -> None:
    """The best of some rounds of each: what else the machine does only adds to CPU time.

    Of a build the best long run less the best short one: a disturbed short run would make their difference too good.
    """
    some = media[:: max(1, len(media) // 40)]
    shorts, longs, bares, ffmpegs = list[float](), list[float](), list[float](), list[float]()
    for _ in range(NUM_ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            shorts.append(cpu_seconds(lambda out=Path(folder) / "s": run_build(media, config, out, num_rows // 8)))
            longs.append(cpu_seconds(lambda out=Path(folder) / "l": run_build(media, config, out, num_rows)))
        bares.append(cpu_seconds(lambda: encode(media, config)))
        if shutil.which("ffmpeg"):
            ffmpegs.append(cpu_seconds(lambda: run_ffmpeg(some, config)))
    build = (num_rows - num_rows // 8) / (min(longs) - min(shorts))
    bare, ffmpeg = len(media) / min(bares), len(some) / min(ffmpegs, default=math.nan)
    ratios = f"{build / bare:13.2f}{build / ffmpeg:15.2f}"
    print(f"{title:30}{build:6.2f}{bare:8.2f}{ffmpeg:9.2f}{ratios}", flush=True)


def cpu_seconds(work: Callable[[], None]) -> float:
    """User and system time of this process and of all that it started, however far down."""
    # The server of a build's worker processes outlives the build: it becomes a child of this process, to wait for.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)

    def used() -> float:
        with contextlib.suppress(ChildProcessError):
            while True:
                os.wait()
        both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in both)

    before = used()
    work()
    return used() - before


def run_build(media: list[Path], config: MediaConfig, out: Path, num_rows: int) -> None:
    """The command, over as many rows as asked; files come again under other names."""
    with started_build(media, config, out, num_rows) as process:
        assert process.wait() == 0, process


@contextmanager
def started_build(
    media: list[Path], config: MediaConfig, out: Path, num_rows: int
) -> Iterator[subprocess.Popen[bytes]]:
    links = out.with_name(f"{out.name}-media")
    links.mkdir(parents=True)
    rows = []
    for number, path in enumerate(islice(cycle(media), num_rows)):
        link = links / f"{number}{path.suffix}"
        link.symlink_to(path)
        rows.append({"file": link.name, "caption": "a sound"})
    (links / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = [f"table={links / 'list.jsonl'}", "dataset=d", f"out={out}", f"num_workers={NUM_WORKERS}"]
    command = [sys.executable, "-m", "shards.build", "table", *words, f"num_frames={config.num_frames}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        yield process


def encode(media: list[Path], config: MediaConfig) -> None:
    for path in media:
        assert isinstance(try_clip(Record(name=path.stem, media=path, recording=""), config, "d"), Sample)


def run_ffmpeg(media: list[Path], config: MediaConfig) -> None:
    """The usual way: a process a sound, and one that seeks a frame."""
    quiet = ["ffmpeg", "-v", "error", "-y", "-threads", "1"]
    side = config.frame_short_side_pixels
    shrink = f"scale='if(gt(iw,ih),-2,min(iw,{side}))':'if(gt(iw,ih),min(ih,{side}),-2)'"
    with tempfile.TemporaryDirectory() as folder:
        for path in media:
            flac = ["-vn", "-ac", "1", "-ar", str(config.sample_rate_hz), "-sample_fmt", "s16", f"{folder}/a.flac"]
            subprocess.run([*quiet, "-i", path, *flac], check=True)
            for time_seconds in frame_times(9.9, config):
                jpeg = ["-frames:v", "1", "-vf", shrink, "-q:v", "3", f"{folder}/a.jpg"]
                subprocess.run([*quiet, "-ss", str(time_seconds), "-i", path, *jpeg], check=True)


def draw_memory(picture: Path, media: list[Path], num_rows: int) -> None:
    """Watch every process of a build until it ends."""
    from matplotlib.figure import Figure

    curves: dict[int, list[tuple[float, float]]] = {}
    begin = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        started_build(media, MediaConfig(num_frames=0), Path(folder) / "set", num_rows) as process,
    ):
        ended = threading.Event()
        threading.Thread(target=lambda: (process.wait(), ended.set()), daemon=True).start()
        job = psutil.Process(process.pid)
        while not ended.wait(0.5):
            for each in [job, *job.children(recursive=True)]:
                try:
                    used = each.memory_full_info().uss / 2**20
                except psutil.Error:
                    continue
                curves.setdefault(each.pid, []).append((time.monotonic() - begin, used))
        assert process.returncode == 0
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for pid, curve in curves.items():
        if len(curve) > 10:
            name = "the job" if pid == process.pid else f"process {pid - process.pid} after it"
            axes.plot(*zip(*curve, strict=True), label=name)
            tenth = len(curve) // 10
            print(f"{name}: {curve[tenth][1]:.0f} MiB after a tenth, {curve[-tenth][1]:.0f} MiB at nine tenths")
    axes.set(xlabel="s", ylabel="memory of its own, MiB", ylim=(0, None), title=f"{num_rows} clips")
    axes.legend()
    figure.savefig(picture)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
