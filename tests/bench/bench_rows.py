"""Time and memory to plan a list of millions of rows: ``python -m tests.bench.bench_rows [num_rows] [num_files]``.

Generates an AudioSet segment list and a folder of (empty) media files, then, in a process of its own, reads
the list and scans the folder as a build does. Prints one JSON line; the memory is the process's peak.
"""

from __future__ import annotations

import json
import random
import resource
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from shards.build import all_records, check_records
from shards.sources import audioset

NUM_LABELS = 527
FILES_PER_FOLDER = 10_000
YTID_LETTERS = string.ascii_letters + string.digits + "-_"


def main() -> None:
    """Generate the list and the media, and measure in a fresh process."""
    num_rows, num_files = (int(word) for word in [*sys.argv[1:], "2000000", "100000"][:2])
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder), num_rows, num_files)
        subprocess.run([sys.executable, "-c", f"from {__spec__.name} import measure; measure({folder!r})"], check=True)


def generate(folder: Path, num_rows: int, num_files: int) -> None:
    """Write ``segments.csv`` of so many rows, and the media of the first of them."""
    random_state = random.Random(0)
    labels = [f"/m/{number:05x}" for number in range(NUM_LABELS)]
    with (folder / "segments.csv").open("w") as file:
        file.write("# Segments csv\n# num_ytids\n# YTID, start_seconds, end_seconds, positive_labels\n")
        for row in range(num_rows):
            ytid = "".join(random_state.choices(YTID_LETTERS, k=11))
            start = 10 * random_state.randrange(30)
            # As varied as the published lists: a fourth as many different label lists as rows, in 22,160 rows.
            num_labels = random_state.choices((1, 2, 3, 4), (4, 3, 2, 1))[0]
            chosen = {labels[int(NUM_LABELS * random_state.random() ** 8)] for _ in range(num_labels)}
            file.write(f'{ytid}, {start}.000, {start + 10}.000, "{",".join(sorted(chosen))}"\n')
            if row < num_files:
                path = folder / "media" / str(row // FILES_PER_FOLDER) / f"Y{ytid}_{start}.flac"
                if row % FILES_PER_FOLDER == 0:
                    path.parent.mkdir(parents=True)
                path.touch()


def measure(folder: str) -> None:
    """Plan the generated list; print seconds and megabytes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu_start = time.perf_counter(), time.process_time()
    config = audioset.AudioSetConfig(segments=f"{folder}/segments.csv", media=f"{folder}/media")
    records = all_records(audioset.records(config))
    check_records(records)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {
        "rows": len(records),
        "with_media": sum(record.media is not None for record in records),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "peak_mib": peak // 1024,
        "of_these_before_the_list_mib": before // 1024,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
