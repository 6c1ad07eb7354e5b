"""Collectives over the rows of every rank. Every rank holds the same number of rows."""

from __future__ import annotations

import torch
import torch.distributed as dist

from audiotext_dist.distributed import is_parallel


def gather_rows(own_ND: torch.Tensor) -> torch.Tensor:
    """Every rank's rows, in rank order: [n, ...] -> [world_size * n, ...]. Carries no gradient."""
    if not is_parallel():
        return own_ND
    gathered = own_ND.new_empty(dist.get_world_size() * own_ND.shape[0], *own_ND.shape[1:])
    dist.all_gather_into_tensor(gathered, own_ND.contiguous())
    return gathered


def reduce_scatter_rows(every_ND: torch.Tensor) -> torch.Tensor:
    """The sum over ranks of this rank's rows: [world_size * n, ...] -> [n, ...]. The transpose of a gather."""
    if not is_parallel():
        return every_ND
    own = every_ND.new_empty(every_ND.shape[0] // dist.get_world_size(), *every_ND.shape[1:])
    dist.reduce_scatter_tensor(own, every_ND.contiguous())
    return own


def logsumexp_over_ranks(own_N: torch.Tensor) -> torch.Tensor:
    """Elementwise log of the sum over ranks of exp: every rank gives [N] and gets [N]."""
    if not is_parallel():
        return own_N
    greatest = own_N.clone()
    dist.all_reduce(greatest, op=dist.ReduceOp.MAX)
    total = torch.exp(own_N - greatest)
    dist.all_reduce(total)
    return greatest + total.log()
