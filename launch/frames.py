"""Which frame is nearest to a clip's sound, as a picture: ``python launch/frames.py run=runs/NAME out=frames.png``."""

from __future__ import annotations

import logging
import sys
from collections import Counter
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
from shards.sources.soundscape.media import read_script

HELP = """Draw the frames of some clips with their cosine to the clip's sound; the nearest has a frame around it.

    python launch/frames.py run=runs/NAME out=frames.png
    python launch/frames.py run=runs/NAME out=frames.png clips=12 data.validation.mine.shards=FOLDER
    python launch/frames.py run=runs/NAME out=frames.png world=corpus/media-test

Of an audio-image run; the first clips of its first validation set. Under Multiframe Match each frame has the cosine to
its own part of the sound. world= names the media folder of an embedded corpus, which knows what its pictures show: the
shares of the set's clips whose nearest frame shows an event of the clip, its background, or something else are printed,
too. Other keys are the recipe's:
"""
DEFAULT_NUM_CLIPS = 8
FRAME_INCHES, ROW_INCHES = 1.9, 2.5


def main() -> None:
    """Embed the clips, draw them."""
    words = sys.argv[1:]
    if not words or {"-h", "--help"} & set(words):
        print(HELP + configuration.describe(Recipe))
        return
    own = dict(word.split("=", 1) for word in words if word.startswith(("run=", "out=", "clips=", "world=")))
    if not {"run", "out"} <= own.keys():
        raise UserError("give run=FOLDER and out=FILE.png")
    if not own["out"].endswith(".png"):
        raise UserError(f"out={own['out']} must be a picture's name, such as frames.png")
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
    batches = _clips(recipe, model.eval(), int(num_clips))
    batch = batches[0]
    cosine_BL = frame_cosines(model, batch)
    draw_frames(batch, cosine_BL, Path(own["out"]))
    chosen = np.bincount(cosine_BL.argmax(axis=1), minlength=cosine_BL.shape[1])
    print(
        f"{own['out']}: {len(batch.keys)} clips, nearest frame {', '.join(f'{n}: {c}' for n, c in enumerate(chosen))}"
    )
    if "world" in own:
        for kind, (share, among_all) in nearest_kinds(model, batches, own["world"]).items():
            print(
                f"nearest frame shows {kind}: {100 * share:.1f} % of the clips ({100 * among_all:.1f} % of all frames)"
            )


def _clips(recipe: Recipe, model: DualEncoder, batch_size: int) -> EvaluationBatches:
    name, chosen = next(iter(recipe.data.validation.items()))
    (shards,) = open_sets({name: chosen}, recipe.data, frames=True, captions=False)
    decode = recipe.data.decode_config(frames="all", frame_pixels=model.frame_pixels, random=False)
    return EvaluationBatches(shards, decode, world=World(), batch_size=batch_size, cache=recipe.data.node_cache())


def nearest_kinds(model: DualEncoder, batches: EvaluationBatches, media: str) -> dict[str, tuple[float, float]]:
    """What a clip's nearest frame shows: kind -> its share of the clips, and beside it its share of all frames.

    Args:
        media: the folder of the embedded corpus that made the clips; it has a frame for each quarter.
    """
    nearest, among_all = Counter[str](), Counter[str]()
    for number in range(len(batches)):
        batch = batches[number]
        for metadata, chosen in zip(batch.metadata, frame_cosines(model, batch).argmax(axis=1), strict=True):
            kinds = read_script(media, metadata.name or "").kinds_shown()
            nearest[kinds[chosen]] += 1
            among_all.update(kinds)
    return {kind: (nearest[kind] / nearest.total(), among_all[kind] / among_all.total()) for kind in sorted(among_all)}


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
    height_inches = ROW_INCHES * num_clips
    figure = Figure(figsize=(FRAME_INCHES * num_frames, height_inches))
    FigureCanvasAgg(figure)
    # No automatic layout, in which a long title drives the frames apart.
    gaps = {"left": 0.01, "right": 0.99, "wspace": 0.04, "hspace": 0.36}
    ends = {"top": 1 - 0.3 / height_inches, "bottom": 0.3 / height_inches}
    panels = figure.subplots(num_clips, num_frames, squeeze=False, gridspec_kw={**gaps, **ends})
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
        panels[clip][0].set_title(title[:90], fontsize=9, loc="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run_for_people(main)
