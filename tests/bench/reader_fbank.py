"""Part ``fbank`` of ``bench_reader.py``: filter banks of a batch of sound on the device that trains."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from audiotext_dist.models.frontends import Fbank, FbankConfig

BATCH_SIZE, CLIP_SECONDS, SAMPLE_RATE_HZ = 64, 10, 32000
NUM_RUNS = {"cpu": 3, "cuda": 50}
COPIED_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}


def measure_fbank(_: Path) -> None:
    """Milliseconds of a batch, and the least that the memory would need: sound read once, filter banks written once."""
    num_threads = torch.get_num_threads()
    print("| device | ms | clips/s | memory's speed, GB/s | ms at that speed | share | MB above the batch |")
    print("|---|---|---|---|---|---|---|", flush=True)
    if torch.cuda.is_available():
        measure_on(torch.device("cuda"), torch.cuda.get_device_name())
    measure_on(torch.device("cpu"), f"CPU, {num_threads} thread{'s' * (num_threads > 1)}")
    if not torch.cuda.is_available():
        print("\nNo GPU is at hand.", flush=True)


def measure_on(device: torch.device, name: str) -> None:
    """The row of one device: the best of some runs."""
    noise_NS = torch.randint(-8000, 8000, (BATCH_SIZE, CLIP_SECONDS * SAMPLE_RATE_HZ), dtype=torch.int16, device=device)
    num_samples_N = torch.full((BATCH_SIZE,), noise_NS.shape[1], device=device)
    fbank = Fbank(FbankConfig(), SAMPLE_RATE_HZ).to(device)
    found = fbank(noise_NS, num_samples_N)
    num_bytes, megabytes = noise_NS.nbytes + found.nbytes, "-"
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fbank(noise_NS, num_samples_N)
        megabytes = f"{(torch.cuda.max_memory_allocated() - before) / 1e6:,.0f}"
    best = min(seconds(device, lambda: fbank(noise_NS, num_samples_N)) for _ in range(NUM_RUNS[device.type]))
    source = torch.ones(COPIED_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    # A copy reads every byte and writes it.
    speed = 2 * source.nbytes / min(seconds(device, lambda: target.copy_(source)) for _ in range(NUM_RUNS[device.type]))
    least = num_bytes / speed
    print(
        f"| {name} | {1000 * best:.2f} | {BATCH_SIZE / best:,.0f} | {speed / 1e9:,.0f} | {1000 * least:.3f} "
        f"| {least / best:.1%} | {megabytes} |",
        flush=True,
    )


def seconds(device: torch.device, work: Callable[[], object]) -> float:
    """By the clock, until the device has done it."""
    _wait_for(device)
    start = time.perf_counter()
    work()
    _wait_for(device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
