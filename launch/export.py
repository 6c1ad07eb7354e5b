"""Weights and recipe of a run, for use without DeepSpeed: ``python launch/export.py run=runs/NAME out=FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import save_file

from audiotext_dist import configuration, storage
from audiotext_dist.errors import UserError, run_for_people
from audiotext_dist.training.checkpoint_folder import RECIPE_FILE
from audiotext_dist.training.recipe import read_run_recipe
from audiotext_dist.training.weights import MODEL_FILE, make_readable, read_weights

HELP = """Export a run's newest checkpoint.

    python launch/export.py run=runs/NAME out=FOLDER [ema=false]

Of a run with training.ema_decay the averaged weights are taken, unless ema=false. Writes model.safetensors (every
weight; the towers lie under audio., image. and text.) and recipe.yaml. The folder serves wherever a run folder does:
model.audio.init=FOLDER, launch/evaluate.py run=FOLDER. In Python, without DeepSpeed:

    recipe = read_run_recipe(Path("FOLDER"))                    # audiotext_dist.training.recipe
    model = build_model(recipe.model.without_weights(), recipe.task, recipe.data.sample_rate_hz)
                                                                # audiotext_dist.models.dual_encoder
    load_model(model, "FOLDER")                                 # audiotext_dist.training.weights
    audio_BD = model.eval().embed_audio(waveform_BS, num_valid_samples_B)
"""


def main() -> None:
    """Copy the newest checkpoint's model and the resolved recipe."""
    words = sys.argv[1:]
    if not words or {"-h", "--help"} & set(words):
        print(HELP)
        return
    own = dict(word.partition("=")[::2] for word in words)
    ema = own.pop("ema", "true")
    if own.keys() != {"run", "out"} or ema not in ("true", "false"):
        raise UserError("give exactly run=FOLDER and out=FOLDER, and ema=false where you like")
    if storage.is_remote(own["out"]):
        raise UserError(f"out={storage.public_name(own['out'])} is remote: export into a local folder and copy it")
    recipe = read_run_recipe(Path(own["run"]))
    out = Path(own["out"])
    out.mkdir(parents=True, exist_ok=True)
    weights = read_weights(own["run"], ema=ema == "true")
    with storage.atomic_local_file(out / MODEL_FILE) as temporary:
        save_file(weights, temporary)
        make_readable(temporary)
    storage.write_bytes(str(out / RECIPE_FILE), configuration.to_yaml(recipe).encode())
    print(f"{sum(tensor.numel() for tensor in weights.values()):,} weights in {out / MODEL_FILE}")


if __name__ == "__main__":
    run_for_people(main)
