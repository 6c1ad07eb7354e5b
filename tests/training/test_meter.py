"""What the loop logs of its data."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from audiotext_dist.data.batch import Batch
from audiotext_dist.data.read_counts import ReadCounts
from audiotext_dist.distributed import World
from audiotext_dist.training import meter as meter_module
from audiotext_dist.training.meter import Meter
from audiotext_dist.training.step_log import progress_line
from tests.ranks import run_on_ranks


def batch_with(counts: ReadCounts) -> Batch:
    batch = copy.copy(_EMPTY)
    batch.counts = counts
    return batch.to(torch.device("cpu"))


_EMPTY = Batch(
    keys=[],
    metadata=[],
    captions=[],
    waveform_BS=torch.zeros(0, 0),
    num_valid_samples_B=torch.zeros(0),
    frames_BLHWC=torch.zeros(0, 0, 0, 0, 3),
    frame_numbers_BL=torch.zeros(0, 0, dtype=torch.int64),
    lone_frame_B=torch.zeros(0, dtype=torch.int64),
    mask_uniforms_B4=torch.zeros(0, 4),
    tokens_BC=None,
    bad_samples=[],
)


def test_the_meter_adds_what_the_workers_counted_and_starts_anew() -> None:
    meter = Meter(World(), global_batch_size=4)
    first = ReadCounts(bytes_read=100, bytes_fetched=1000, cache_hits=1, cache_misses=2, prefetch_waits=3)
    second = ReadCounts(bytes_read=300, bytes_fetched=0, cache_hits=10, cache_misses=0, prefetch_waits=1)
    assert len(list(meter.waiting_for(iter([batch_with(first), batch_with(second)])))) == 2
    read = meter.read()
    assert (read["data/cache_hits"], read["data/cache_misses"], read["data/prefetch_waits"]) == (11, 2, 4)
    assert round(read["data/read_bytes_per_second"] / read["data/fetched_bytes_per_second"], 6) == 0.4
    assert round(read["data/read_bytes_per_second"] / read["data/clips_per_second"], 6) == 50
    assert read["memory/resident_bytes"] > 1e7
    counted = ("cache", "bytes", "waits")
    again = {name: value for name, value in meter.read().items() if name.startswith("data/")}
    assert not any(value for name, value in again.items() if any(word in name for word in counted))


def test_the_peak_of_a_step_is_not_that_of_what_happens_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device of a stand-in for CUDA's counters."""
    peak = {"bytes": 9000.0}  # of building the model
    monkeypatch.setattr(World, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: peak["bytes"])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: peak["bytes"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: peak.update(bytes=100.0))
    for name in ("max_over_ranks", "sums_over_ranks"):
        monkeypatch.setattr(meter_module, name, lambda values, _: list(values))
    meter, read = Meter(World(), global_batch_size=4), []
    for step, step_bytes in enumerate((500.0, 400.0, 200.0, 300.0)):
        peak["bytes"] = max(peak["bytes"], step_bytes)
        if step != 1:
            read.append(meter.read()["memory/device_allocated_peak_bytes"])
        with meter.stopped():
            peak["bytes"] = 7000.0  # of an evaluation
    assert read == [500, 400, 300]


class Clock:
    """In the place of the system's."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def perf_counter(self) -> float:
        return self.seconds


def read_with_a_clock(rank: int) -> list[dict[str, float]]:
    """Two lines of a rank that waits 1 s (rank 0) or 3 s for each batch, of which one is done every 4 s."""
    clock, waiting_seconds = Clock(), 1.0 + 2.0 * rank

    def batches() -> Iterator[Batch]:
        while True:
            clock.seconds += waiting_seconds
            yield batch_with(ReadCounts())

    lines = []
    with mock.patch.object(meter_module, "time", clock):
        meter = Meter(World(rank=rank, size=2), global_batch_size=6)
        for step, _ in zip(range(1, 5), meter.waiting_for(batches()), strict=False):
            clock.seconds += 4.0 - waiting_seconds
            if step % 2 == 0:
                lines.append(meter.read())
                with meter.stopped():
                    clock.seconds += 50.0  # a checkpoint
    return lines


def test_waiting_is_shared_out_by_rank_and_speed_is_that_of_all() -> None:
    for lines in run_on_ranks(read_with_a_clock, 2):
        for line in lines:
            assert line["data/waiting_share_min"] == pytest.approx(1 / 4)
            assert line["data/waiting_share_max"] == pytest.approx(3 / 4)
            assert line["data/clips_per_second"] == pytest.approx(6 / 4)


def test_the_progress_line_tells_what_the_data_cost_and_lacked() -> None:
    read = {
        "data/clips_per_second": 512.0,
        "data/waiting_share_max": 0.25,
        "data/read_bytes_per_second": 3e6,
        "data/fetched_bytes_per_second": 2e6,
        "data/cache_hits": 7,
        "data/cache_misses": 3,
        "data/prefetch_waits": 1,
    }
    bad = {"bad_samples": 3, "bad_samples/broken_audio": 2, "bad_samples/too_large": 1}
    assert progress_line(1.5, 2.0, 1e-3, read, bad) == (
        "epoch 1.5, loss 2.000, lr 1.0e-03, 512 clips/s, 3.0 MB/s, waiting 25%, fetched 2.0 MB/s, hits 7 of 8, "
        "replaced 2 broken_audio, 1 too_large"
    )
    local = {**read, "data/cache_hits": 0, "data/cache_misses": 0, "data/prefetch_waits": 0}
    assert progress_line(1.5, 2.0, 1e-3, local, {"bad_samples": 0}).endswith("waiting 25%")
