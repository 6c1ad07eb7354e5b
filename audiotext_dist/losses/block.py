"""One rank's block of scores, made tile by tile, and the gradients that its tiles add up to.

Shapes: n rows of this rank, N rows of all ranks, D embedding, c rows of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch


class BlockLoss(NamedTuple):
    """What one rank makes of its block, such that the mean over ranks is that of the whole batch.

    terms: by name, each before its weight. recalls, mean_scores: see ``figures.ScoreFigures``. grad_bias: with respect
    to a bias of all scores.
    """

    terms: dict[str, torch.Tensor]
    recalls: dict[str, torch.Tensor]
    mean_scores: dict[str, torch.Tensor]
    grad_bias: torch.Tensor | None = None


class Block:
    """Scores x_nD @ t_ND^T, never more than a tile of them at once.

    Where t_ND is in lower precision than x_nD, products read both sides so; what they write stays as x_nD is.
    """

    def __init__(self, x_nD: torch.Tensor, t_ND: torch.Tensor) -> None:
        self.dtype, self._read_dtype = x_nD.dtype, t_ND.dtype
        self._x_nD, self._t_ND = self._as_read(x_nD), self._as_read(t_ND)

    @property
    def num_own(self) -> int:
        """n."""
        return len(self._x_nD)

    @property
    def num_all(self) -> int:
        """N."""
        return len(self._t_ND)

    def tiles(self, tile_bytes: int, num_buffers: int, extra_bytes: int) -> Iterator[tuple[slice, list[torch.Tensor]]]:
        """Slices of the rows, each with so many uninitialised buffers [c, N], which stay within the bytes together
        with the extra bytes an entry that the caller takes besides.
        """
        if self._x_nD.dtype != self.dtype:
            # Of a product before it is in its buffer, and later of the rounded gradient, which is smaller.
            extra_bytes += self.dtype.itemsize
        bytes_a_row = self.num_all * (num_buffers * self.dtype.itemsize + extra_bytes)
        rows = min(self.num_own, max(1, tile_bytes // max(bytes_a_row, 1)))
        # Allocated once: on a CPU fresh pages cost as much as the arithmetic.
        buffers = self._x_nD.new_empty(num_buffers, rows, self.num_all, dtype=self.dtype)
        for start in range(0, self.num_own, max(rows, 1)):
            tile = slice(start, min(start + rows, self.num_own))
            yield tile, [buffer[: tile.stop - tile.start] for buffer in buffers]

    def scores(self, tile: slice, out_cN: torch.Tensor) -> torch.Tensor:
        """The tile's scores, in the buffer that is given."""
        return self._product(self._x_nD[tile], self._t_ND.T, out_cN)

    def sum_of_scores(self) -> torch.Tensor:
        """All of the block's scores added up, without making any."""
        return torch.dot(self._x_nD.sum(dim=0, dtype=self.dtype), self._t_ND.sum(dim=0, dtype=self.dtype))

    def sum_of_groups(self, group_N: torch.Tensor, num_groups: int, own: slice) -> torch.Tensor:
        """The scores between rows of one group added up, the same way. own: which of the N are this rank's."""
        t_GD = self._t_ND.new_zeros(num_groups, self._t_ND.shape[1], dtype=self.dtype)
        t_GD.index_add_(0, group_N, self._t_ND.to(self.dtype))
        return (self._x_nD.to(self.dtype) * t_GD[group_N[own]]).sum()

    def start_gradients(self) -> None:
        """Room for the gradients with respect to x_nD and t_ND."""
        self.grad_x_nD = self._x_nD.new_empty(self._x_nD.shape, dtype=self.dtype)
        self.grad_t_ND = self._t_ND.new_zeros(self._t_ND.shape, dtype=self.dtype)

    def add_gradient(self, tile: slice, g_cN: torch.Tensor) -> None:
        """Take in the gradient with respect to a tile's scores; it may be rounded in place."""
        g_cN = self._rounded(g_cN)
        self._product(g_cN, self._t_ND, self.grad_x_nD[tile])
        self._add_product(g_cN.T, self._x_nD[tile], self.grad_t_ND)

    def _rounded(self, g_cN: torch.Tensor) -> torch.Tensor:
        """As products read it; on a CPU in its own memory."""
        return self._as_read(g_cN) if g_cN.device.type != "cpu" else g_cN.copy_(g_cN.to(self._read_dtype))

    def _as_read(self, tensor: torch.Tensor) -> torch.Tensor:
        # A CPU has no product that reads bfloat16 and writes float32; rounding first says the same.
        read = tensor.to(self._read_dtype)
        return read.to(self.dtype) if tensor.device.type == "cpu" else read

    def _add_product(self, left: torch.Tensor, right: torch.Tensor, to: torch.Tensor) -> None:
        if left.dtype == self.dtype:
            to.addmm_(left, right)
        else:
            to += torch.mm(left, right, out_dtype=self.dtype)

    def _product(self, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if left.dtype == self.dtype:
            return torch.mm(left, right, out=out)
        return out.copy_(torch.mm(left, right, out_dtype=self.dtype))
