"""What the loss costs: CPU time and memory against other ways to the same value, its share of a step, 1 M pairs.

    python -m tests.bench.bench_losses [square | kinds | ranks | step | million]

Every measurement is a fresh process, or a fresh process a rank, with one thread each. Memory is the highest resident
size of a rank while loss and gradients are made, less what it held before, its own embeddings among it. Methods that
would take more than MAX_BYTES are left out.
"""

import gc
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import open_clip
import torch
import torch.distributed as dist
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from audiotext_dist.distributed import World
from audiotext_dist.losses import figures, softmax
from audiotext_dist.losses.block import Block
from audiotext_dist.losses.config import LossConfig
from audiotext_dist.losses.contrastive import Teachers, contrastive_loss
from audiotext_dist.losses.gather import RowLayout
from audiotext_dist.losses.targets import make_targets
from audiotext_dist.models.audio import AudioTowerConfig
from audiotext_dist.models.dual_encoder import ModelConfig, ModelInputs, build_model
from audiotext_dist.models.text import TextTowerConfig
from audiotext_dist.training.engine import Engine, start_process_group
from audiotext_dist.training.engine_config import EngineConfig, deepspeed_config
from tests.ranks import run_on_ranks

DIM = 512
CHUNK_ROWS = 512
MAX_BYTES = 9e9
CONFIG = LossConfig()
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def ours(a: torch.Tensor, t: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return contrastive_loss(a, t, scale, CONFIG).loss


def naive(a: torch.Tensor, t: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    logits, own = scale * a @ t.T, torch.arange(len(a))
    return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2


def clip_loss(a: torch.Tensor, t: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    place = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    loss: torch.Tensor = open_clip.loss.ClipLoss(local_loss=True, gather_with_grad=True, **place)(a, t, scale)
    return loss


def chunks(a: torch.Tensor, t: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Checkpointed chunks of rows, then of columns."""

    def part(rows: torch.Tensor, every: torch.Tensor, first: int) -> torch.Tensor:
        own = torch.arange(first, first + len(rows))
        return functional.cross_entropy(scale * rows @ every.T, own, reduction="sum")

    total = torch.zeros(())
    for first in range(0, len(a), CHUNK_ROWS):
        for rows, every in ((a, t), (t, a)):
            total = total + checkpoint(part, rows[first : first + CHUNK_ROWS], every, first, use_reentrant=False)
    return total / (2 * len(a))


def of_kind(config: LossConfig) -> Loss:
    """As a training step asks for it: the recordings are told, of two clips each. The teacher is the model itself."""

    def loss(a: torch.Tensor, t: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        bias = torch.full((1,), -10.0, requires_grad=True) if config.name == "sigmoid" else None
        teachers = Teachers(a.detach(), t.detach()) if config.teacher_weight else None
        recording_n = torch.arange(len(a)) // 2
        return contrastive_loss(a, t, scale, config, bias=bias, recording_n=recording_n, teachers=teachers).loss

    return loss


def siglip_loss(a: torch.Tensor, t: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = open_clip.loss.SigLipLoss()(a, t, scale, torch.full((1,), -10.0, requires_grad=True))
    return loss


KINDS = {
    "own pairs": of_kind(LossConfig()),
    "recordings": of_kind(LossConfig(pair_weight=0, recording_weight=1)),
    "teachers": of_kind(LossConfig(pair_weight=0, teacher_weight=1)),
    "sigmoid": of_kind(LossConfig(name="sigmoid")),
}
METHODS: dict[str, Loss] = {
    "ours": ours,
    **KINDS,
    "naive": naive,
    "open_clip": clip_loss,
    "open_clip sigmoid": siglip_loss,
    "chunks": chunks,
}


def unit_rows(num_rows: int, seed: int, dim: int = DIM) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(num_rows, dim, generator=generator), dim=1)


def held_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    """The high-water mark since it was last reset."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def measure(work: Callable[[], None]) -> tuple[float, int]:
    """CPU seconds and bytes."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before, start = held_bytes(), time.process_time()
    work()
    return time.process_time() - start, peak_bytes() - before


def one_loss(rank: int, method: str, num_rows: int) -> tuple[float, int]:
    """Loss and gradients of this rank's rows."""
    a, t = (unit_rows(num_rows, seed).requires_grad_() for seed in (2 * rank, 2 * rank + 1))
    scale = torch.tensor([14.3], requires_grad=True)

    def work() -> None:
        METHODS[method](a, t, scale).backward()
        a.grad = t.grad = scale.grad = None

    # Threads, libraries and their buffers are there before anything is measured.
    small = [side[:64].detach().clone().requires_grad_() for side in (a, t)]
    METHODS[method](*small, scale).backward()
    return measure(work)


def expected_bytes(method: str, num_own: int, num_all: int) -> float:
    """Formulas of the methods in fp32. Ours: 12 c N, within tile_bytes, and 12 N D; teachers have a side to scale."""
    if method == "ours" or method in KINDS:
        scaled_bytes = 4 * DIM * num_own * (method == "teachers")
        return min(CONFIG.tile_bytes, 12 * num_own * num_all) + 12 * DIM * num_all + scaled_bytes
    match method:
        case "chunks":
            return 12 * CHUNK_ROWS * num_all + 12 * DIM * num_all
        case "open_clip":
            return 16.0 * num_own * num_all
        case _:
            return 16.0 * num_all**2


def compare(world_size: int, sizes: list[int], methods: list[str]) -> None:
    print(f"\n{world_size} rank(s), D = {DIM}, fp32: CPU seconds / MB a rank (of formula)")
    print(f"| N | {' | '.join(methods)} |\n|---|{'---|' * len(methods)}")
    for num_all in sizes:
        cells = []
        for method in methods:
            expected = expected_bytes(method, num_all // world_size, num_all)
            if expected * world_size > MAX_BYTES:
                cells.append("")
                continue
            found = run_on_ranks(one_loss, world_size, method, num_all // world_size)
            seconds, num_bytes = (max(values) for values in zip(*found, strict=True))
            cells.append(f"{seconds:.2f} / {num_bytes / 1e6:.0f} ({num_bytes / expected:.2f})")
        print(f"| {num_all} | {' | '.join(cells)} |", flush=True)


def rows_of_share(rank: int, num_own: int, num_all: int, measured_rows: int, tile_bytes: int) -> tuple[float, int]:
    """Some rows of one rank's share; the other side is synthetic, and the collectives are left out."""
    softmax.logsumexp_over_ranks = figures.max_over_ranks = lambda own_N, layout: own_N
    x, every = 14.3 * unit_rows(measured_rows, 0), unit_rows(num_all, 1)
    layout = RowLayout(counts=(measured_rows, num_all - measured_rows))

    def work() -> None:
        block = Block(x, every)
        targets = make_targets(CONFIG, layout, None, like=x)
        softmax.softmax_loss(block, targets, None, LossConfig(tile_bytes=tile_bytes))

    return measure(work)


def share_of(num_own: int, num_all: int, measured_rows: int, tile_bytes: int) -> None:
    seconds, num_bytes = run_on_ranks(rows_of_share, 1, num_own, num_all, measured_rows, tile_bytes)[0]
    # The other side lay in memory before the measurement.
    num_bytes += 4 * DIM * num_all
    expected = min(tile_bytes, 12 * measured_rows * num_all) + 12 * DIM * num_all
    print(
        f"\nN = {num_all}, {measured_rows} of the {num_own} rows of a rank, D = {DIM}: {seconds:.1f} CPU seconds, "
        f"{num_bytes / 1e9:.2f} GB ({num_bytes / expected:.2f} of formula), so the share takes "
        f"{seconds * num_own / measured_rows:.0f} CPU seconds",
        flush=True,
    )


def step_share(rank: int, world_size: int, num_own: int) -> dict[str, float]:
    """Seconds of one step of the paper's towers (CLIP ViT-B/32 on sound, its text tower), and of loss and gather."""
    os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{world_size}")
    start_process_group(World.from_environment())
    torch.set_num_threads(1)
    config = ModelConfig(audio=AudioTowerConfig(name="ViT-B-32"), text=TextTowerConfig(name="ViT-B-32", frozen=True))
    model = build_model(config, "audio-text", 16000)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-4)
    engine = Engine(
        model,
        optimizer,
        deepspeed_config(
            EngineConfig(), global_batch_size=num_own * world_size, world_size=world_size, gradient_clipping=None
        ),
    )
    inputs = ModelInputs(
        waveform_NS=torch.randn(num_own, 160000) / 10,
        num_valid_samples_N=torch.full((num_own,), 160000),
        tokens_NC=model.text.tokenize(["a dog barks"] * num_own),
    )
    spent = {"loss and gather": 0.0, "step": 0.0}
    for number in range(2):
        start = time.perf_counter()
        a, t = engine(inputs)
        dist.barrier()
        before = time.perf_counter()
        loss = contrastive_loss(a, t, model.scale(), CONFIG).loss
        inside = time.perf_counter() - before
        engine.backward(loss)
        engine.step()
        if number:  # the first one warms up
            spent["loss and gather"] += inside
            spent["step"] += time.perf_counter() - start
    return spent


def main() -> None:
    chosen = sys.argv[1:] or ["square", "kinds", "ranks", "step", "million"]
    if "square" in chosen:
        compare(1, [4096, 8192, 16384, 32768], ["ours", "naive", "open_clip", "chunks"])
        share_of(num_own=65536, num_all=65536, measured_rows=8192, tile_bytes=CONFIG.tile_bytes)
    if "kinds" in chosen:
        compare(1, [16384], ["ours", *KINDS, "open_clip", "open_clip sigmoid"])
    if "ranks" in chosen:
        compare(2, [4096, 8192, 16384], ["ours", "open_clip"])
    if "step" in chosen:
        spent = run_on_ranks(step_share, 2, 2, 4)[0]
        print(
            f"\nstep of 2 x 4 clips, ViT-B/32: {spent}, share {spent['loss and gather'] / spent['step']:.5f}",
            flush=True,
        )
    if "million" in chosen:
        share_of(num_own=4096, num_all=1 << 20, measured_rows=256, tile_bytes=1 << 30)


if __name__ == "__main__":
    main()
