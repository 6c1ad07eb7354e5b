"""A full-size stage 1, its features, and a stage 2 that learns from them, by the recipes of estimated correspondences.

    python -m tests.bench.bench_correspondences [BATCH_SIZE] [full|tiny]

PaSST and RoBERTa-large of random weights; clips of 10, 20 and 30 s, captions of a tokenizer of fourteen words; all else
as launch/recipes/correspondences/clotho/passt_*.yaml have it. fp32 on a CPU, where 4 clips, the default, fit into 16
GB; bfloat16 on a GPU, where 64 are the paper's batch. Each line is a process, whose most memory counts the checkpoint
at its end; CPU seconds and clips a second are those of the steps without the first, where there are more, and of all
that is embedded. tiny: two-layer towers, to see in a minute that it works.
"""

import contextlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import RobertaConfig

from audiotext_dist.distributed import World
from audiotext_dist.training import loop
from audiotext_dist.training.preemption import StopRequest
from audiotext_dist.training.prepare import prepare
from audiotext_dist.training.recipe import read_recipe
from launch import embed
from tests.clips import make_sample, write_shards
from tests.models.hub_models import WORDS, save_text_model

RECIPES = "launch/recipes/correspondences/clotho"
SAMPLE_RATE_HZ = 32000
STAGES = ("stage1", "embed", "self")
NUM_STEPS = {"cpu": {"stage1": 2, "self": 1}, "cuda": {"stage1": 20, "self": 20}}
ROBERTA_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "vocab_size": 50265,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
}
TINY_PASST = "model.audio.passt={width: 24, depth: 2, num_heads: 3}"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, kw_only=True)
class Took:
    """What a step, or an embedding of all clips, took; its loss if it has one."""

    cpu_seconds: float
    seconds: float
    loss: float | None


def main() -> None:
    """Make clips and tokenizer; print a line a stage."""
    batch_size, size = [*sys.argv[1:], *("4", "full")[len(sys.argv) - 1 :]]
    print("| stage | first and last loss | CPU s | clips/s | GB |")
    print("|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        samples = [
            make_sample(
                number,
                seconds=10.0 * (1 + number % 3),
                num_frames=0,
                captions=[f"a {WORDS[1 + number % 7]} {WORDS[2 + number % 5]}"] * 5,
                sample_rate_hz=SAMPLE_RATE_HZ,
            )
            for number in range(2 * int(batch_size))
        ]
        write_shards(folder / "clips", [samples])
        save_text_model(folder / "text", "roberta", with_weights=False)
        if size == "full":
            RobertaConfig(**ROBERTA_LARGE).save_pretrained(folder / "text")
        for stage in STAGES:
            subprocess.run([sys.executable, "-m", __spec__.name, "case", stage, name, batch_size, size], check=True)


def case(stage: str, folder: Path, batch_size: int, size: str) -> None:
    """One stage."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    took: list[Took] = []
    with contextlib.redirect_stdout(sys.stderr):
        if stage == "embed":
            _embed(folder, took)
        else:
            _train(stage, folder, batch_size, size, took)
    counted = took[1:] or took
    cpu_seconds = sum(each.cpu_seconds for each in counted) / len(counted)
    seconds = sum(each.seconds for each in counted) / len(counted)
    num_clips = 2 * batch_size if stage == "embed" else batch_size
    num_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if DEVICE.type == "cuda":
        num_bytes = torch.cuda.max_memory_allocated()
    losses = "-" if stage == "embed" else f"{took[0].loss:.4f}, {took[-1].loss:.4f}"
    print(f"| {stage} | {losses} | {cpu_seconds:.1f} | {num_clips / seconds:.2f} | {num_bytes / 1e9:.1f} |", flush=True)


def _train(stage: str, folder: Path, batch_size: int, size: str, took: list[Took]) -> None:
    first = folder / "stage1"
    words = [
        f"recipe={RECIPES}/passt_{stage}.yaml",
        f"run_dir={folder / stage}",
        f"data.train={{clotho: {{shards: {folder / 'clips'}}}}}",
        "data.validation={}",
        "data.num_workers=0",
        "checkpoint.best_metric=null",
        "tracker.wandb=disabled",
        "model.audio.pretrained=null",
        f"model.text.name={folder / 'text'}",
        "model.text.pretrained=null",
        f"training.precision={'bf16' if DEVICE.type == 'cuda' else 'fp32'}",
        f"training.global_batch_size={batch_size}",
        f"training.max_steps={NUM_STEPS[DEVICE.type][stage]}",
        *([] if size == "full" else [TINY_PASST]),
        *([] if stage == "stage1" else [f"model.init={first}", f"data.teachers={{passt: {first}}}"]),
    ]
    with mock.patch.object(loop, "train_step", _timed(loop.train_step, took)):
        loop.train(prepare(read_recipe(words), World.from_environment()), StopRequest())


def _embed(folder: Path, took: list[Took]) -> None:
    words = [f"run={folder / 'stage1'}", "features=passt", f"shards={folder / 'clips'}", "data.num_workers=0"]
    with (
        mock.patch.object(sys, "argv", ["embed.py", *words]),
        mock.patch.object(embed, "embed_shards", _timed(embed.embed_shards, took)),
    ):
        embed.main()


def _timed(function: Callable[..., Any], took: list[Took]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        cpu_start, start = time.process_time(), _now()
        result = function(*args, **kwargs)
        seconds, cpu_seconds = _now() - start, time.process_time() - cpu_start
        took.append(Took(cpu_seconds=cpu_seconds, seconds=seconds, loss=getattr(result, "loss", None)))
        return result

    return timed


def _now() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    if sys.argv[1:2] == ["case"]:
        case(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
    else:
        main()
