"""Which steps are sick, and what becomes of them.

1. A loss that is not finite, on any rank, is known to all before any rank's backward: the loss they compare is the
   mean over ranks, which is finite only where every rank's is. So every rank comes to the same judgement alone.
2. A gradient that is not finite is known to all from its norm over all ranks, before the optimizer moves. Under
   fp16 it is an overflow, which lowers the loss scale; it is skipped and counted, but is no sickness that ends a run
   until the scale cannot fall further (loss_scale.py).
3. Either way the step is skipped on all ranks: weights, optimizer and schedule stay as they were. The batch counts as
   read, and the next step takes the next one; only the schedule waits, since it counts updates.
4. A spike is a loss far above the recent ones. It is counted and logged, and skipped only where the recipe says so.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from audiotext_dist import storage
from audiotext_dist.distributed import World, gather_items
from audiotext_dist.errors import UserError

Sickness = Literal["loss", "gradient", "spike", "overflow"]
SICK_BATCH_FILE = "sick_batch.json"
MEND_OF_DIVERGENCE = (
    "lower optim.weight_lr, lengthen optim.warmup_epochs, or set optim.gradient_clipping=1.0; "
    "training.resume=auto goes on from the last checkpoint"
)
# A spike is judged by the median of so many losses, and not before there are as many.
SPIKE_WINDOW = 32
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Health:
    """What a checkpoint keeps: the counts of a run so far, and the losses by which spikes are judged.

    num_skipped_in_a_row: up to the last step. An older checkpoint does not tell it.
    """

    num_sick_losses: int = 0
    num_sick_gradients: int = 0
    num_spikes: int = 0
    num_overflows: int = 0
    num_skipped: int = 0
    num_skipped_in_a_row: int = 0
    recent_losses: tuple[float, ...] = ()


class HealthWatch:
    """Judges each step; the same on every rank.

    Args:
        spike_ratio: a loss above so many times the median of the last ones is a spike; None: nothing is.
        skip_spikes: whether a spike is skipped as a sick step is.
        max_sick_in_a_row: skipped steps that may follow one another.
    """

    def __init__(
        self, health: Health, *, spike_ratio: float | None, skip_spikes: bool, max_sick_in_a_row: int, run_dir: Path
    ) -> None:
        self.health = health
        self._spike_ratio, self._skip_spikes = spike_ratio, skip_spikes
        self._max_sick_in_a_row, self._run_dir = max_sick_in_a_row, run_dir

    def judge_loss(self, loss: float) -> Sickness | None:
        """What is wrong with a loss, the mean over ranks."""
        if not math.isfinite(loss):
            return "loss"
        recent = self.health.recent_losses
        if self._spike_ratio is None or len(recent) < SPIKE_WINDOW:
            return None
        return "spike" if loss > self._spike_ratio * statistics.median(recent) else None

    def is_skipped(self, sickness: Sickness | None) -> bool:
        """Whether such a step leaves everything as it was."""
        return sickness is not None and (sickness != "spike" or self._skip_spikes)

    def note(self, step: int, loss: float, sickness: Sickness | None, keys: Sequence[str], world: World) -> None:
        """Count a step that is over; every rank calls it with its own keys.

        Raises:
            UserError: too many were skipped in a row; the batch's keys stand in a file that it names.
        """
        skipped, health = self.is_skipped(sickness), self.health
        recent = health.recent_losses
        num_in_a_row = health.num_skipped_in_a_row
        if sickness != "overflow":
            num_in_a_row = num_in_a_row + 1 if skipped else 0
        if math.isfinite(loss) and not (sickness == "spike" and skipped):
            recent = (*recent, loss)[-SPIKE_WINDOW:]
        self.health = Health(
            num_sick_losses=health.num_sick_losses + (sickness == "loss"),
            num_sick_gradients=health.num_sick_gradients + (sickness == "gradient"),
            num_spikes=health.num_spikes + (sickness == "spike"),
            num_overflows=health.num_overflows + (sickness == "overflow"),
            num_skipped=health.num_skipped + skipped,
            num_skipped_in_a_row=num_in_a_row,
            recent_losses=recent,
        )
        if sickness is not None and world.is_main:
            what = {
                "loss": "a loss that is not finite",
                "gradient": "a gradient that is not finite",
                "spike": "a spike",
                "overflow": "gradients too large for this loss scale, which is halved",
            }
            _log.warning("step %d: %s (%.4g)%s", step, what[sickness], loss, ", skipped" if skipped else "")
        if self.health.num_skipped_in_a_row > self._max_sick_in_a_row:
            self._stop(step, sickness, keys, world)

    def metrics(self) -> dict[str, float]:
        """The counts by kind, for the tracker."""
        counts = dataclasses.asdict(self.health)
        return {f"health/{name}": float(count) for name, count in counts.items() if name != "recent_losses"}

    def _stop(self, step: int, sickness: Sickness | None, keys: Sequence[str], world: World) -> None:
        file = self._run_dir / SICK_BATCH_FILE
        keys_of_ranks = gather_items(list(keys))
        if world.is_main:
            content = {"step": step, "sickness": sickness, "keys_of_ranks": keys_of_ranks}
            storage.write_bytes(str(file), json.dumps(content, indent=1).encode())
        raise UserError(
            f"the {sickness} of step {step} is not right, and {self.health.num_skipped_in_a_row} steps in a row were "
            f"skipped, more than training.max_sick_steps_in_a_row={self._max_sick_in_a_row} (the batch's clips: "
            f"{file}): {MEND_OF_DIVERGENCE}"
        )
