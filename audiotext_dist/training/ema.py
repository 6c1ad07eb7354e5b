"""A moving average of the weights, which often retrieves better than the weights of the last step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


class Ema:
    """The exponential moving average of every trained parameter, in float32 on its device.

    After each update, average = decay * average + (1 - decay) * weight (Polyak and Juditsky 1992; the decay form of
    Tarvainen and Valpola 2017, arXiv:1703.01780); it starts from the weights that the model has now.
    Buffers stay the model's own, so BatchNorm's running statistics are those of the weights that are not averaged.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._weights = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self._averages = {name: value.detach().float().clone() for name, value in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of one more step."""
        weights = [value.float() for value in self._weights.values()]
        torch._foreach_lerp_(list(self._averages.values()), weights, 1 - self._decay)

    @contextlib.contextmanager
    def in_the_model(self) -> Iterator[None]:
        """Inside, the model has the averages; afterwards its weights are what they were, to the bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def state(self) -> dict[str, torch.Tensor]:
        """Name -> average, on the CPU."""
        return {name: value.cpu().contiguous() for name, value in self._averages.items()}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Take up what ``state`` gave; an average that is not in it starts from the model's weight."""
        for name, average in self._averages.items():
            average.copy_(state.get(name, self._weights[name].detach()))

    @torch.no_grad()
    def _exchange(self) -> None:
        # One at a time, so that no third copy of all weights is needed.
        for name, average in self._averages.items():
            weight = self._weights[name].clone()
            self._weights[name].copy_(average)
            average.copy_(weight)
