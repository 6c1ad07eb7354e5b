"""Symmetric InfoNCE in one block per rank (Temporal agreement, Eq. 1; the CLIP loss).

Shapes: n rows of this rank, N = world_size * n rows in all, D embedding, c rows of a tile.

1. Gather the other side once, T_ND. This rank's block of scaled cosines is S = scale * a_nD @ T_ND^T.
2. Walk the block in tiles of c rows. A row's logsumexp is local; the columns' are joined over the ranks
   by a maximum and a sum of N floats.
3. Walk it again for the gradient with respect to S: G = (softmax over rows + softmax over columns) / 2
   minus the targets, all over n. Then d a = scale * G @ T, d T = scale * G^T @ a, whose sum over ranks is
   scattered back to the rows' owners, and d scale = sum of G * S / scale.

So memory is a tile and a few [N, D], never [n, N]; there are four matmuls and one gather, and every
collective is in the forward: a rank that decides to skip the backward leaves no other one waiting.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from audiotext_dist.distributed import is_parallel
from audiotext_dist.losses.gather import gather_rows, logsumexp_over_ranks, reduce_scatter_rows

DEFAULT_TILE_BYTES = 256 << 20


class ContrastiveOutput(NamedTuple):
    """loss: whose mean over ranks is the global loss. own_rank_n: for each own row, how many columns score above its
    pair (0 = found first).
    """

    loss: torch.Tensor
    own_rank_n: torch.Tensor


def contrastive_loss(
    a_nD: torch.Tensor, t_nD: torch.Tensor, scale: torch.Tensor, *, tile_bytes: int = DEFAULT_TILE_BYTES
) -> ContrastiveOutput:
    """InfoNCE in both directions, averaged, over the rows of every rank; row i of one side pairs with row i.

    The mean over ranks of the returned losses is the loss of the whole batch. An engine that averages
    gradients over ranks, as DeepSpeed does, gets the whole batch's gradient for every parameter, the
    temperature included.

    Args:
        a_nD, t_nD: this rank's L2-normalised embeddings, float32 or float64, as many on every rank.
        scale: [1], 1 / temperature.
        tile_bytes: budget of one tile of the block of cosines.
    """
    assert a_nD.shape == t_nD.shape, "one row a side for each clip"
    assert scale.shape == (1,)
    loss, own_rank_n = _OneBlockInfoNCE.apply(a_nD, t_nD, scale, tile_bytes)  # type: ignore[no-untyped-call]
    return ContrastiveOutput(loss, own_rank_n)


class _OneBlockInfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a_nD: torch.Tensor, t_nD: torch.Tensor, scale: torch.Tensor, tile_bytes: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        every_t_ND = gather_rows(t_nD.detach())
        num_own, num_all = len(a_nD), len(every_t_ND)
        first_pair = num_own * (dist.get_rank() if is_parallel() else 0)
        tile_rows = max(1, tile_bytes // (num_all * a_nD.element_size()))
        tiles = [slice(start, min(start + tile_rows, num_own)) for start in range(0, num_own, tile_rows)]

        row_lse_n = a_nD.new_empty(num_own)
        pair_n = a_nD.new_empty(num_own)
        own_rank_n = torch.empty(num_own, dtype=torch.int64, device=a_nD.device)
        col_lse_N = a_nD.new_full((num_all,), -torch.inf)
        for tile in tiles:
            s_cN = scale * (a_nD[tile] @ every_t_ND.T)
            pair_n[tile] = s_cN.diagonal(first_pair + tile.start)
            row_lse_n[tile] = s_cN.logsumexp(dim=1)
            col_lse_N = torch.logaddexp(col_lse_N, s_cN.logsumexp(dim=0))
            own_rank_n[tile] = (s_cN > pair_n[tile, None]).sum(dim=1)
        col_lse_N = logsumexp_over_ranks(col_lse_N)

        grad_a_nD = torch.empty_like(a_nD)
        grad_every_t_ND = torch.zeros_like(every_t_ND)
        grad_scale = torch.zeros_like(scale)
        for tile in tiles:
            cosine_cN = a_nD[tile] @ every_t_ND.T
            s_cN = scale * cosine_cN
            g_cN = (s_cN - row_lse_n[tile, None]).exp_()
            g_cN += (s_cN - col_lse_N).exp_()
            g_cN /= 2
            g_cN.diagonal(first_pair + tile.start).sub_(1)
            g_cN /= num_own
            grad_scale += (g_cN * cosine_cN).sum()
            g_cN *= scale
            grad_a_nD[tile] = g_cN @ every_t_ND
            grad_every_t_ND.addmm_(g_cN.T, a_nD[tile])
        ctx.save_for_backward(grad_a_nD, reduce_scatter_rows(grad_every_t_ND), grad_scale)

        own_col_lse_n = col_lse_N[first_pair : first_pair + num_own]
        ctx.mark_non_differentiable(own_rank_n)
        return ((row_lse_n + own_col_lse_n) / 2 - pair_n).mean(), own_rank_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        grad_a_nD, grad_t_nD, grad_scale = ctx.saved_tensors
        return grad_loss * grad_a_nD, grad_loss * grad_t_nD, grad_loss * grad_scale, None
