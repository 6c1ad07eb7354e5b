"""Towers through ``torch.compile``."""

from __future__ import annotations

import os
import shutil

from audiotext_dist.errors import UserError
from audiotext_dist.models.dual_encoder import DualEncoder


def check_compiler() -> None:
    """Raise ``UserError`` unless this machine can build what torch.compile writes."""
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    if not any(shutil.which(name) for name in names):
        raise UserError(
            f"engine.compile=true needs a C++ compiler, and there is no {' or '.join(names)}: install one, or set "
            "engine.compile=false"
        )


def compile_towers(model: DualEncoder, *, backend: str = "inductor") -> None:
    """Compile each tower at its first batch; names of weights stay as they are.

    A second size of batch, such as the last one of an evaluation, compiles once more, for any size; so does a pass
    without gradient.
    """
    # Late, since it takes a second.
    from torch._inductor import config as inductor

    # Dropout then draws what it draws uncompiled, in both passes over a micro-batch.
    inductor.fallback_random = True
    for tower in (model.audio, model.image, model.text):
        if tower is not None:
            tower.compile(backend=backend)
