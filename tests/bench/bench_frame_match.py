"""A full-size step of temporal agreement for each way to match frames, from JPEGs' pixels and from frame features.

    python -m tests.bench.bench_frame_match [batch_size=8] [peak_tflops=0]

CLIP ViT-B/32 of random weights on both sides, as the recipes have it, 10 s of noise at the recipe's rate; forward,
loss, backward and LARS. fp32 on a CPU, bfloat16 on a GPU, where a batch of 128 and above and the GPU's own peak_tflops
(989 for an H100) are worth giving. Reading and decoding have bench_reader.py. Each case is a fresh process.
"""

import os
import resource
import subprocess
import sys
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from audiotext_dist.losses.contrastive import contrastive_loss
from audiotext_dist.losses.frame_match import match_frames
from audiotext_dist.models.dual_encoder import ModelInputs
from audiotext_dist.training.optim import build_optimizer
from audiotext_dist.training.prepare import build_towers
from audiotext_dist.training.recipe import Recipe, read_recipe

RECIPES = "launch/recipes/temporal_agreement"
METHODS = ("conventional", "nearest_n00", "multiframe")
NUM_STEPS = {"cpu": 1, "cuda": 20}
NUM_FRAMES, FRAME_PIXELS, EMBED_DIM = 4, 224, 512


def main() -> None:
    """Print a line a case."""
    batch_size, peak_tflops = [*sys.argv[1:], *("8", "0")[len(sys.argv) - 1 :]]
    print("| method | images from | clips/s | CPU s a step | GB | TFLOP a step | share of peak |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for method in METHODS:
        for source in ("pixels", "features"):
            words = [sys.executable, "-m", __spec__.name, "case", method, source, batch_size, peak_tflops]
            subprocess.run(words, check=True)


def case(method: str, source: str, batch_size: int, peak_tflops: float) -> None:
    """One method from one source."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    recipe = read_recipe([f"recipe={RECIPES}/{method}_audio_image.yaml", "model.image.pretrained=null"])
    model = build_towers(recipe).to(device)
    model.autocast_dtype = torch.bfloat16 if device.type == "cuda" else None
    optimizer = build_optimizer(model, recipe.optim, global_batch_size=batch_size)
    inputs = _inputs(recipe, batch_size, source, device)

    def step() -> None:
        audio_ND, image_ND = model(inputs)
        image_ND, _ = match_frames(audio_ND, image_ND, recipe.loss)
        contrastive_loss(audio_ND, image_ND, model.scale(), recipe.loss, bias=model.logit_bias).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with FlopCounterMode(display=False) as counter:  # the first step, which warms up
        step()
    cpu_start, start = time.process_time(), _now(device)
    for _ in range(NUM_STEPS[device.type]):
        step()
    seconds, cpu_seconds = (_now(device) - start), (time.process_time() - cpu_start)
    seconds, cpu_seconds = seconds / NUM_STEPS[device.type], cpu_seconds / NUM_STEPS[device.type]
    num_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if device.type == "cuda":
        num_bytes = torch.cuda.max_memory_allocated()
    tflop = counter.get_total_flops() / 1e12
    share = f"{100 * tflop / seconds / peak_tflops:.0f} %" if peak_tflops else "-"
    figures = f"{batch_size / seconds:.2f} | {cpu_seconds:.1f} | {num_bytes / 1e9:.1f} | {tflop:.2f} | {share}"
    print(f"| {method} | {source} | {figures} |", flush=True)


def _inputs(recipe: Recipe, batch_size: int, source: str, device: torch.device) -> ModelInputs:
    num_frames = 1 if recipe.loss.frame_match == "one" else NUM_FRAMES
    num_samples = round(recipe.data.sample_rate_hz * recipe.data.clip_seconds)
    pixels = (batch_size, num_frames, FRAME_PIXELS, FRAME_PIXELS, 3)
    frames_NLHWC = torch.randint(0, 256, pixels, dtype=torch.uint8, device=device)
    embeddings_NLD = torch.randn(batch_size, num_frames, EMBED_DIM, device=device)
    return ModelInputs(
        waveform_NS=torch.randint(-3000, 3000, (batch_size, num_samples), dtype=torch.int16, device=device),
        num_valid_samples_N=torch.full((batch_size,), num_samples, device=device),
        mask_uniforms_N4=torch.rand(batch_size, 4, device=device),
        frames_NHWC=_lone(frames_NLHWC) if source == "pixels" else None,
        image_embeddings_ND=_lone(embeddings_NLD) if source == "features" else None,
    )


def _lone(values_NL: torch.Tensor) -> torch.Tensor:
    """Without the axis of frames where there is one."""
    return values_NL[:, 0] if values_NL.shape[1] == 1 else values_NL


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    if sys.argv[1:2] == ["case"]:
        case(sys.argv[2], sys.argv[3], int(sys.argv[4]), float(sys.argv[5]))
    else:
        main()
