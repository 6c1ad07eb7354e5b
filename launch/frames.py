"""Which frame is nearest to a clip's sound, as a picture: ``python launch/frames.py run=runs/NAME out=frames.png``."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from audiotext_dist import configuration
from audiotext_dist.data.batch import Batch
from audiotext_dist.data.loader import EvaluationBatches
from audiotext_dist.data.sets import open_sets
from audiotext_dist.distributed import World
from audiotext_dist.errors import UserError, run_for_people
from audiotext_dist.models.dual_encoder import DualEncoder, build_model, unit_length
from audiotext_dist.training.recipe import Recipe, read_run_recipe
from audiotext_dist.training.weights import load_model

HELP = """Draw the frames of some clips with their cosine to the clip's sound; the nearest has a frame around it.

    python launch/frames.py run=runs/NAME out=frames.png
    python launch/frames.py run=runs/NAME out=frames.png clips=12 data.validation.mine.shards=FOLDER

Of an audio-image run; the first clips of its first validation set. Under Multiframe Match each frame has the cosine to
its own part of the sound. Other keys are the recipe's:
"""
DEFAULT_NUM_CLIPS = 8


def main() -> None:
    """Embed the clips, draw them."""
    words = sys.argv[1:]
    if not words or {"-h", "--help"} & set(words):
        print(HELP + configuration.describe(Recipe))
        return
    own = dict(word.split("=", 1) for word in words if word.startswith(("run=", "out=", "clips=")))
    if not {"run", "out"} <= own.keys():
        raise UserError("give run=FOLDER and out=FILE.png")
    num_clips = own.get("clips", str(DEFAULT_NUM_CLIPS))
    if not num_clips.isdecimal() or int(num_clips) < 1:
        raise UserError(f"clips={num_clips} must be a whole number above 0")
    changes = [word for word in words if word.split("=", 1)[0] not in own]
    recipe = read_run_recipe(Path(own["run"]), ["data.frame_features=null", *changes])
    if recipe.task != "audio-image" or not recipe.data.validation:
        raise UserError(f"{own['run']} has task={recipe.task}: give an audio-image run with a validation set")
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(message)s", force=True)
    model = build_model(recipe.model.without_weights(), recipe.task, recipe.data.sample_rate_hz)
    load_model(model, own["run"])
    batch = _first_clips(recipe, model, int(num_clips))
    cosine_BL = frame_cosines(model.eval(), batch)
    draw_frames(batch, cosine_BL, Path(own["out"]))
    chosen = np.bincount(cosine_BL.argmax(axis=1), minlength=cosine_BL.shape[1])
    print(
        f"{own['out']}: {len(batch.keys)} clips, nearest frame {', '.join(f'{n}: {c}' for n, c in enumerate(chosen))}"
    )


def _first_clips(recipe: Recipe, model: DualEncoder, num_clips: int) -> Batch:
    name, chosen = next(iter(recipe.data.validation.items()))
    (shards,) = open_sets({name: chosen}, recipe.data, frames=True, captions=False)
    decode = recipe.data.decode_config(frames="all", frame_pixels=model.frame_pixels, random=False)
    return EvaluationBatches(shards, decode, world=World(), batch_size=num_clips, cache=recipe.data.node_cache())[0]


@torch.no_grad()
def frame_cosines(model: DualEncoder, batch: Batch) -> np.ndarray:
    """The cosine of each frame with its clip's sound, or with its own part of it, [B, L]."""
    audio_BD = model.embed_audio(batch.waveform_BS, batch.num_valid_samples_B)
    image_BLD = model.embed_images(batch.frames_BLHWC)
    num_parts = image_BLD.shape[1] if model.matches_all_frames else 1
    audio_BLD = unit_length(audio_BD.reshape(len(audio_BD), num_parts, -1))
    cosine_BL: np.ndarray = (audio_BLD * image_BLD).sum(dim=-1).numpy()
    return cosine_BL


def draw_frames(batch: Batch, cosine_BL: np.ndarray, path: Path) -> None:
    """A row a clip: its frames in time order, the one with the highest cosine marked."""
    num_clips, num_frames = cosine_BL.shape
    figure = Figure(figsize=(1.9 * num_frames, 2.3 * num_clips), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(num_clips, num_frames, squeeze=False)
    for clip, metadata in enumerate(batch.metadata):
        for number, axes in enumerate(panels[clip]):
            axes.imshow(batch.frames_BLHWC[clip, number].numpy())
            axes.set(xticks=[], yticks=[])
            is_nearest = number == cosine_BL[clip].argmax()
            time = f"{metadata.frame_times[number]:.1f} s, " if metadata.frame_times else ""
            axes.set_xlabel(
                f"{time}cos {cosine_BL[clip, number]:.3f}", fontsize=8, fontweight="bold" if is_nearest else None
            )
            for side in axes.spines.values():
                side.set(edgecolor="#e45756" if is_nearest else "#cccccc", linewidth=4 if is_nearest else 1)
        title = ", ".join(metadata.labels) or batch.keys[clip]
        heading = panels[clip][0].set_title(title[:90], fontsize=9, loc="left")
        heading.set_in_layout(False)  # it may run over the next frames
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run_for_people(main)
