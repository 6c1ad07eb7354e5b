"""What a step logs of its scores beside the loss: R@1 within the batch, means over positive and negative pairs.

Shapes: n rows of this rank, N rows of all ranks, G recordings, D embedding, c rows of a tile.

They are nearly free. R@1 takes the maxima that the softmax needs anyway, of each row and column but its own pair, and
one more all-reduce, of N floats. The sum of all scores is the product of the two sides' sums, so the means look at own
pairs only.
"""

from __future__ import annotations

import torch

from audiotext_dist.losses.block import Block
from audiotext_dist.losses.frame_match import FramesBlock
from audiotext_dist.losses.gather import max_over_ranks
from audiotext_dist.losses.targets import Targets


class ScoreFigures:
    """Figures of a block, once every tile was added; their mean over ranks is that of the whole batch."""

    def __init__(self, block: Block, targets: Targets) -> None:
        self._block, self._targets, own = block, targets, targets.layout.own
        self._num_rows_found = targets.count_N.new_zeros(())
        self._own_n = torch.empty_like(targets.count_N[own])
        self._greatest_other_N = torch.full_like(targets.count_N, -torch.inf)
        self._negative_sum = targets.count_N.new_zeros(())

    def add(self, tile: slice, s_cN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take a tile's scores in, before any bias; the greatest of each of its rows, [c], and columns, [N]."""
        own_pairs_c = self._targets.own_pairs(s_cN, tile)
        own_c = self._own_n[tile] = own_pairs_c.clone()
        own_pairs_c.fill_(-torch.inf)
        other_c, other_N = s_cN.amax(dim=1), s_cN.amax(dim=0)
        own_pairs_c.copy_(own_c)
        self._num_rows_found += (own_c > other_c).sum()
        torch.maximum(self._greatest_other_N, other_N, out=self._greatest_other_N)
        if isinstance(self._block, FramesBlock):
            # The best frame's scores are no product of two sums.
            self._negative_sum += self._block.sum_but(self._targets.same_recording(tile), s_cN)
        own_columns = self._targets.columns_of(tile)
        other_N[own_columns] = torch.maximum(other_N[own_columns], own_c)
        return torch.maximum(other_c, own_c), other_N

    def recalls(self) -> dict[str, torch.Tensor]:
        """The share of rows, and of columns, whose own pair scores highest. A tie is not found: of towers that say
        the same of every clip it would be all.

        Every rank of the group calls it.
        """
        layout = self._targets.layout
        greatest_other_N = max_over_ranks(self._greatest_other_N, layout)
        num_columns_found = (self._own_n > greatest_other_N[layout.own]).sum().to(self._own_n.dtype)
        return {
            "recall_at_1": self._num_rows_found * layout.row_share,
            "reverse_recall_at_1": num_columns_found * layout.row_share,
        }

    def mean_scores(self) -> dict[str, torch.Tensor]:
        """Over own pairs, and over pairs of different recordings: 0 where there are none."""
        layout, own_sum, negative_sum = self._targets.layout, self._own_n.sum(), self._negative_sum
        if not isinstance(self._block, FramesBlock):
            negative_sum = self._block.sum_of_scores() - self._sum_of_related(own_sum)
        num_negatives = (layout.num_all**2 - self._targets.count_N.sum()).clamp(min=1)
        return {
            "positive": own_sum * layout.row_share,
            "negative": negative_sum * layout.world_size / num_negatives,
        }

    def _sum_of_related(self, own_sum: torch.Tensor) -> torch.Tensor:
        """The sum of the scores between clips of one recording."""
        targets = self._targets
        if targets.num_recordings == targets.layout.num_all:
            return own_sum
        return self._block.sum_of_groups(targets.recording_N, targets.num_recordings, targets.layout.own)
