"""The factor on an fp16 loss, which keeps its small gradients from vanishing."""

from __future__ import annotations

from dataclasses import dataclass

# PyTorch's and DeepSpeed's common values.
INIT_LOSS_SCALE = 2.0**16
GROWTH_STEPS = 2000


@dataclass(frozen=True, kw_only=True)
class LossScale:
    """Dynamic loss scaling (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2).

    The factor is halved where gradients overflow, and doubled after ``GROWTH_STEPS`` updates in a row. It is a power
    of two, so that scaling costs no bit of a gradient that is large enough.

    num_good_steps: updates since it last changed.
    """

    value: float = INIT_LOSS_SCALE
    num_good_steps: int = 0

    @property
    def can_fall(self) -> bool:
        """False where an overflow is no matter of the scale: unscaled gradients are not finite either."""
        return self.value > 1.0

    def after(self, *, overflow: bool) -> LossScale:
        """The scale of the next step."""
        if overflow:
            return LossScale(value=max(self.value / 2, 1.0))
        if self.num_good_steps + 1 == GROWTH_STEPS:
            return LossScale(value=self.value * 2)
        return LossScale(value=self.value, num_good_steps=self.num_good_steps + 1)
