"""Collectives over the rows of every rank of a process group. Ranks may hold different numbers of rows, or none.

Shapes: n rows of this rank, N rows of all ranks of the group, X anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, kw_only=True)
class RowLayout:
    """Whose rows stand where, once gathered: rank after rank. counts: rows of each rank of the group."""

    counts: tuple[int, ...]
    rank: int = 0
    group: dist.ProcessGroup | None = None

    @property
    def world_size(self) -> int:
        """Ranks of the group."""
        return len(self.counts)

    @property
    def num_all(self) -> int:
        """N."""
        return sum(self.counts)

    @property
    def row_share(self) -> float:
        """What one row counts in the loss of its rank, such that the mean over ranks is the mean over all rows."""
        return self.world_size / max(self.num_all, 1)

    @property
    def first_own(self) -> int:
        """Place of this rank's first row among all."""
        return sum(self.counts[: self.rank])

    @property
    def own(self) -> slice:
        """Places of this rank's rows among all."""
        return slice(self.first_own, self.first_own + self.counts[self.rank])


def row_layout(num_own: int, device: torch.device, group: dist.ProcessGroup | None = None) -> RowLayout:
    """The layout that the ranks of a group make together; all of them must call it. None is every rank."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return RowLayout(counts=(num_own,))
    counts = torch.empty(dist.get_world_size(group), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(counts, torch.tensor([num_own], device=device), group=group)
    return RowLayout(counts=tuple(counts.tolist()), rank=dist.get_rank(group), group=group)


def gather_rows(own_nX: torch.Tensor, layout: RowLayout) -> torch.Tensor:
    """Every rank's rows in rank order, [n, X] -> [N, X].

    The gradient of a gathered row is the sum over ranks of what each of them says of it, sent back to its owner:
    under an engine that averages gradients over ranks that is the gradient of the mean over ranks of the losses.
    """
    if layout.world_size == 1 or layout.num_all == 0:
        return own_nX
    gathered: torch.Tensor = _GatherRows.apply(own_nX, layout)  # type: ignore[no-untyped-call]
    return gathered


def reduce_scatter_rows(every_NX: torch.Tensor, layout: RowLayout) -> torch.Tensor:
    """The sum over ranks of this rank's rows, [N, X] -> [n, X]: the transpose of a gather."""
    if layout.world_size == 1 or layout.num_all == 0:
        return every_NX
    most, num_own = max(layout.counts), layout.counts[layout.rank]
    if min(layout.counts) < most:
        # The collective wants equal parts.
        padded = every_NX.new_zeros(layout.world_size, most, *every_NX.shape[1:])
        for part, rows in zip(padded, torch.split(every_NX, list(layout.counts)), strict=True):
            part[: len(rows)] = rows
        every_NX = padded.flatten(0, 1)
    own = every_NX.new_empty(most, *every_NX.shape[1:])
    dist.reduce_scatter_tensor(own, every_NX.contiguous(), group=layout.group)
    return own[:num_own]


def logsumexp_over_ranks(own_N: torch.Tensor, layout: RowLayout) -> torch.Tensor:
    """Elementwise log of the sum over ranks of exp: every rank gives [N] and gets [N]; -inf is a share of nothing."""
    if layout.world_size == 1:
        return own_N
    greatest = max_over_ranks(own_N.clone(), layout)
    total = torch.exp(own_N - greatest)
    dist.all_reduce(total, group=layout.group)
    return greatest + total.log()


def max_over_ranks(own_N: torch.Tensor, layout: RowLayout) -> torch.Tensor:
    """Elementwise greatest over the ranks of the group, in place."""
    if layout.world_size > 1:
        dist.all_reduce(own_N, op=dist.ReduceOp.MAX, group=layout.group)
    return own_N


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own_nX: torch.Tensor, layout: RowLayout) -> torch.Tensor:
        ctx.layout = layout
        most = max(layout.counts)
        padded = own_nX.contiguous()
        if len(own_nX) < most:
            padded = torch.cat([own_nX, own_nX.new_zeros(most - len(own_nX), *own_nX.shape[1:])])
        gathered = own_nX.new_empty(layout.world_size * most, *own_nX.shape[1:])
        dist.all_gather_into_tensor(gathered, padded, group=layout.group)
        if min(layout.counts) == most:
            return gathered
        parts = torch.split(gathered, most)
        return torch.cat([part[:count] for part, count in zip(parts, layout.counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NX: torch.Tensor) -> tuple[torch.Tensor, None]:
        return reduce_scatter_rows(grad_NX, ctx.layout), None
