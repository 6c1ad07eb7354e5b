from __future__ import annotations

import pytest
from open_clip.transformer import VisionTransformer

from audiotext_dist.models.clip import create_clip


@pytest.fixture(scope="session")
def vit_b_32() -> VisionTransformer:
    """The image tower of CLIP ViT-B/32 with random weights; not to be changed."""
    return create_clip("ViT-B-32", None).visual
