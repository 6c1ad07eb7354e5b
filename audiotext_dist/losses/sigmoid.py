"""The sigmoid loss (SigLIP, Zhai et al. 2023, arXiv:2303.15343, Eq. 1) in one block a rank.

Shapes: n rows of this rank, N rows of all ranks, c rows of a tile.

Every score is a question of its own, answered with 1 or 0, so one walk over the block's tiles does: three matmuls.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from audiotext_dist.losses.block import Block, BlockLoss
from audiotext_dist.losses.config import LossConfig
from audiotext_dist.losses.figures import ScoreFigures
from audiotext_dist.losses.targets import Targets

# Above it softplus is the identity: not before float64 says so.
_LINEAR_ABOVE = 40.0


def sigmoid_loss(block: Block, targets: Targets, bias: torch.Tensor, config: LossConfig) -> BlockLoss:
    """Binary cross-entropy of score + bias, summed over pairs and divided by the rows of the batch."""
    share = targets.layout.row_share
    extra_bytes = targets.mask_bytes + block.dtype.itemsize  # of the masks and of softplus
    values = {term.name: bias.new_zeros(()) for term in targets.terms}
    figures, grad_bias = ScoreFigures(block, targets), torch.zeros_like(bias)
    block.start_gradients()
    for tile, (s_cN, g_cN, free_cN) in block.tiles(config.tile_bytes, 3, extra_bytes):
        figures.add(tile, block.scores(tile, s_cN))
        s_cN.add_(bias)
        g_cN.zero_()
        for term in targets.terms:
            values[term.name] -= targets.subtract(term, tile, s_cN, g_cN, free_cN)
            asked_cN = functional.softplus(s_cN, threshold=_LINEAR_ABOVE)
            answer_cN = torch.sigmoid(s_cN, out=free_cN)
            if term.leaves_out:
                others_cN = targets.others(tile)
                asked_cN.masked_fill_(others_cN, 0.0)
                answer_cN.masked_fill_(others_cN, 0.0)
            values[term.name] += share * asked_cN.sum()
            g_cN.add_(answer_cN, alpha=term.weight * share)
        grad_bias += g_cN.sum()
        block.add_gradient(tile, g_cN)
    return BlockLoss(terms=values, recalls=figures.recalls(), mean_scores=figures.mean_scores(), grad_bias=grad_bias)
