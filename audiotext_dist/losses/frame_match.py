"""Which of a clip's frames stand for it (Temporal agreement, Eq. 3), once the loss sees all of them.

Shapes: n rows of this rank, N rows of all ranks, L frames a clip, D embedding, c rows of a tile.

Nearest Match picks each clip's own frame first, and the pairs of the batch are then ordinary ones. Eq. 3 may also be
read as a score of every pair of the batch, the highest over the other clip's frames: that is ``FramesBlock``.
Multiframe Match (Eq. 4) needs nothing here: the model joins each side's frames into one vector.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from audiotext_dist.losses.block import Block
from audiotext_dist.losses.config import LossConfig


def match_frames(
    a_nD: torch.Tensor, frames_nLD: torch.Tensor, config: LossConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The image side as the loss takes it, [n, D] under ``nearest`` or [n, L, D], and the figures to log.

    The figures, ``frame_0_share`` and so on, say of how many clips a frame is the own nearest one. Where a clip comes
    with one vector, [n, D], it is that, and there are no figures.
    """
    if frames_nLD.ndim == 2:
        return frames_nLD, {}
    number_n = nearest_frame(a_nD, frames_nLD)
    share_L = torch.bincount(number_n, minlength=frames_nLD.shape[1]) / max(len(number_n), 1)
    figures = {f"frame_{number}_share": share for number, share in enumerate(share_L.to(a_nD.dtype))}
    if config.frame_match == "maximum":
        return frames_nLD, figures
    return frames_nLD[torch.arange(len(number_n), device=number_n.device), number_n], figures


@torch.no_grad()
def nearest_frame(a_nD: torch.Tensor, frames_nLD: torch.Tensor) -> torch.Tensor:
    """For each clip the number of its own frame with the highest cosine to its sound, int64 [n]; all of unit length."""
    return torch.einsum("nd,nld->nl", a_nD, frames_nLD).argmax(dim=1)


class FramesBlock(Block):
    """Scores of each row with each clip's best frame, the maximum over l of x_nD @ t_NLD[:, l]^T.

    Memory is a tile, with one more buffer and the numbers of the best frames; the price is L times the matmuls.
    """

    def __init__(self, x_nD: torch.Tensor, t_NLD: torch.Tensor) -> None:
        super().__init__(x_nD, t_NLD)
        assert t_NLD.shape[1] < 256, "a byte holds a frame's number"
        self._t_LND = self._t_ND.transpose(0, 1).contiguous()

    def tiles(self, tile_bytes: int, num_buffers: int, extra_bytes: int) -> Iterator[tuple[slice, list[torch.Tensor]]]:
        """As ``Block.tiles``; one frame's scores, the best frames' numbers and a mask are counted in."""
        for tile, buffers in super().tiles(tile_bytes, num_buffers + 1, extra_bytes + 2):
            self._frame_cN = buffers.pop()
            yield tile, buffers

    def scores(self, tile: slice, out_cN: torch.Tensor) -> torch.Tensor:
        """The tile's scores, in the buffer that is given; which frames these are of is kept for ``add_gradient``."""
        self._product(self._x_nD[tile], self._t_LND[0].T, out_cN)
        self._best_cN = torch.zeros_like(out_cN, dtype=torch.uint8)
        for number, t_ND in enumerate(self._t_LND[1:], start=1):
            self._product(self._x_nD[tile], t_ND.T, self._frame_cN)
            self._best_cN.masked_fill_(self._frame_cN > out_cN, number)
            torch.maximum(out_cN, self._frame_cN, out=out_cN)
        return out_cN

    def sum_but(self, left_out_cN: torch.Tensor, s_cN: torch.Tensor) -> torch.Tensor:
        """The sum of a tile's scores but for some, in the memory of one frame's."""
        return torch.mul(s_cN, ~left_out_cN, out=self._frame_cN).sum()

    def start_gradients(self) -> None:
        """Room for the gradients with respect to x_nD and t_NLD."""
        super().start_gradients()
        self.grad_x_nD.zero_()

    def add_gradient(self, tile: slice, g_cN: torch.Tensor) -> None:
        """Take in the gradient with respect to the scores that were made last: each goes to its best frame."""
        for number, t_ND in enumerate(self._t_LND):
            own_cN = self._rounded(torch.mul(g_cN, self._best_cN == number, out=self._frame_cN))
            self._add_product(own_cN, t_ND, self.grad_x_nD[tile])
            self._add_product(own_cN.T, self._x_nD[tile], self.grad_t_ND[:, number])
