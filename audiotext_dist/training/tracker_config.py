"""What a recipe says of logging; read without W&B, which takes a second to import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from audiotext_dist.errors import require_positive


@dataclass(frozen=True, kw_only=True)
class TrackerConfig:
    """Logging.

    wandb: ``auto`` is online when logged in, else offline; ``disabled`` writes JSON lines only. every_steps: of which
    one is logged; what concerns time and data is then over all of them.
    """

    wandb: Literal["auto", "offline", "disabled"] = "auto"
    project: str = "audiotext-dist"
    entity: str | None = None
    every_steps: int = 10

    def __post_init__(self) -> None:
        require_positive(self, "tracker", "every_steps")
