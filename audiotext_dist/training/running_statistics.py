"""What BatchNorm remembers of past batches, as in mn10: no gradient moves it, so DeepSpeed knows nothing of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from audiotext_dist.distributed import mean_over_ranks


class RunningStatistics:
    """The running means and variances of a model as they are now, to be had again after a forward that is not to count.

    Such are the forward of a step that is skipped, the first of the two of a micro-batch, and that of activations that
    are computed again in the backward.
    """

    def __init__(self, model: nn.Module) -> None:
        self._live = _statistics_of(model)
        self._kept = [each.clone() for each in self._live]

    def restore(self) -> None:
        """Bring them back to what they were."""
        for live, kept in zip(self._live, self._kept, strict=True):
            live.copy_(kept)


def average_running_statistics(model: nn.Module) -> None:
    """Give every rank the mean over ranks, each of which has only seen its share of the batches.

    Called before evaluation and saving: the running mean is linear, so that it comes to the same as in every step.
    """
    statistics = [each for each in _statistics_of(model) if each.is_floating_point()]
    if not statistics:
        return
    means = mean_over_ranks(torch.cat([each.flatten() for each in statistics]))
    for each, mean in zip(statistics, torch.split(means, [each.numel() for each in statistics]), strict=True):
        each.copy_(mean.view_as(each))


def _statistics_of(model: nn.Module) -> list[Tensor]:
    # Not of those that are fixed: the mean of equal numbers may differ from them by its rounding.
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]
    return [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
