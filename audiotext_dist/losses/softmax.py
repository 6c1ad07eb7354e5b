"""Cross-entropy between targets and the softmax of the scores, over rows and over columns, in one block a rank.

Shapes: n rows of this rank, N rows of all ranks, c rows of a tile.

1. Walk the block in tiles. A row's logsumexp is local; the columns' are joined over the ranks by a maximum and
   a sum of N floats. The teachers' scores get the same treatment, in the same tiles.
2. Walk it again for the gradient G with respect to the scores: the softmax over rows and that over columns, each
   times what its row or column counts, minus the targets.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from audiotext_dist.losses.block import Block, BlockLoss
from audiotext_dist.losses.config import LossConfig
from audiotext_dist.losses.figures import ScoreFigures
from audiotext_dist.losses.gather import RowLayout, logsumexp_over_ranks
from audiotext_dist.losses.targets import TEACHER, TEACHER_ENTROPY, Targets


def softmax_loss(block: Block, targets: Targets, teachers: Block | None, config: LossConfig) -> BlockLoss:
    """The loss and its gradients; every collective is in here.

    teachers: the block of their scores, mean cosine / temperature, on the same rows.
    """
    walk = _Walk(block, targets, teachers, config)
    figures = walk.sum_up()
    recalls, mean_scores = figures.recalls(), figures.mean_scores()
    return BlockLoss(terms=walk.make_gradients(), recalls=recalls, mean_scores=mean_scores)


class _Softmax:
    """The softmax over each row of a block and, over all ranks, over each column, once every tile was added.

    mass_N: what row or column i counts in the loss. direction_weights: of the rows and of the columns; of what weighs
    nothing no logsumexp is made.
    """

    def __init__(self, layout: RowLayout, mass_N: torch.Tensor, direction_weights: tuple[float, float]) -> None:
        self._layout, self._mass_N, self._direction_weights = layout, mass_N, direction_weights
        self._row_n = torch.zeros_like(mass_N[layout.own])
        self._column_N = torch.full_like(mass_N, -torch.inf)

    def add(
        self, tile: slice, s_cN: torch.Tensor, free_cN: torch.Tensor, maxima: tuple[torch.Tensor, torch.Tensor] | None
    ) -> None:
        """Take a tile in, overwriting free_cN. maxima: of its rows and columns, where they are known."""
        row_weight, column_weight = self._direction_weights
        if row_weight:
            max_c = s_cN.amax(dim=1) if maxima is None else maxima[0]
            self._row_n[tile] = torch.sub(s_cN, max_c[:, None], out=free_cN).exp_().sum(dim=1).log_() + max_c
        if column_weight:
            lowest = torch.finfo(s_cN.dtype).min  # of a column that is left out of every row, whose sum is 0
            max_N = s_cN.amax(dim=0).clamp_(min=lowest) if maxima is None else maxima[1]
            column_N = torch.sub(s_cN, max_N, out=free_cN).exp_().sum(dim=0).log_() + max_N
            self._column_N = torch.logaddexp(self._column_N, column_N)

    def join(self) -> None:
        """Join the columns over the ranks: after the last tile."""
        if self._direction_weights[1]:  # the same on every rank
            self._column_N = logsumexp_over_ranks(self._column_N, self._layout)

    def log_sums(self, mass_N: torch.Tensor) -> torch.Tensor:
        """The logsumexps of this rank's rows and columns, each by what it counts, summed."""
        row_weight, column_weight = self._direction_weights
        own = self._layout.own
        sums_n = row_weight * self._row_n
        if column_weight:
            sums_n += column_weight * self._column_N[own]
        return torch.dot(mass_N[own], sums_n)

    def weighted(self, tile: slice, s_cN: torch.Tensor, free_cN: torch.Tensor) -> Iterator[torch.Tensor]:
        """Softmax times what its row counts, then the same of the columns, each in free_cN."""
        row_weight, column_weight = self._direction_weights
        if row_weight:
            shift_c = self._row_n[tile] - (row_weight * self._mass_N[self._layout.own][tile]).log()
            yield torch.sub(s_cN, shift_c[:, None], out=free_cN).exp_()
        if column_weight:
            yield torch.sub(s_cN, self._column_N - (column_weight * self._mass_N).log(), out=free_cN).exp_()


class _Walk:
    def __init__(self, block: Block, targets: Targets, teachers: Block | None, config: LossConfig) -> None:
        self._block, self._targets, self._teachers, self._config = block, targets, teachers, config
        layout, weights = targets.layout, config.direction_weights
        self._one_N = torch.full_like(targets.count_N, layout.row_share)
        self._softmaxes = {}
        for leaves_out in (False, True):
            masses = [term.weight * term.mass_N for term in targets.terms if term.leaves_out == leaves_out]
            if teachers is not None and not leaves_out:
                masses.append(config.teacher_weight * self._one_N)
            if masses:
                self._softmaxes[leaves_out] = _Softmax(layout, torch.stack(masses).sum(dim=0), weights)
        self._teacher_softmax = _Softmax(layout, self._one_N, weights)

    def sum_up(self) -> ScoreFigures:
        """The first walk."""
        figures = ScoreFigures(self._block, self._targets)
        for tile, (s_cN, free_cN) in self._tiles(2):
            maxima = figures.add(tile, self._block.scores(tile, s_cN))
            for leaves_out, softmax in self._softmaxes_of(tile, s_cN):
                softmax.add(tile, s_cN, free_cN, None if leaves_out else maxima)
            if self._teachers is not None:
                self._teacher_softmax.add(tile, self._teachers.scores(tile, s_cN), free_cN, None)
        for softmax in self._softmaxes.values():
            softmax.join()
        if self._teachers is not None:
            self._teacher_softmax.join()
        return figures

    def make_gradients(self) -> dict[str, torch.Tensor]:
        """The second walk; what each term comes to."""
        terms = self._targets.terms
        values = {term.name: self._softmaxes[term.leaves_out].log_sums(term.mass_N) for term in terms}
        if self._teachers is not None:
            values[TEACHER] = self._softmaxes[False].log_sums(self._one_N)
            values[TEACHER_ENTROPY] = self._teacher_softmax.log_sums(self._one_N)
        self._block.start_gradients()
        for tile, (s_cN, g_cN, free_cN, *z_cN) in self._tiles(3 if self._teachers is None else 4):
            self._block.scores(tile, s_cN)
            g_cN.zero_()
            for term in terms:
                values[term.name] -= self._targets.subtract(term, tile, s_cN, g_cN, free_cN)
            if self._teachers is not None:
                self._teachers.scores(tile, z_cN[0])
                for target_cN in self._teacher_softmax.weighted(tile, z_cN[0], free_cN):
                    values[TEACHER] -= _dot(target_cN, s_cN)
                    values[TEACHER_ENTROPY] -= _dot(target_cN, z_cN[0])
                    g_cN.sub_(target_cN, alpha=self._config.teacher_weight)
            for _, softmax in self._softmaxes_of(tile, s_cN):
                for weighted_cN in softmax.weighted(tile, s_cN, free_cN):
                    g_cN += weighted_cN
            self._block.add_gradient(tile, g_cN)
        return values

    def _tiles(self, num_buffers: int) -> Iterator[tuple[slice, list[torch.Tensor]]]:
        return self._block.tiles(self._config.tile_bytes, num_buffers, self._targets.mask_bytes)

    def _softmaxes_of(self, tile: slice, s_cN: torch.Tensor) -> Iterator[tuple[bool, _Softmax]]:
        """Each softmax in turn, the scores being those that it runs over; whether some of them are left out."""
        for leaves_out, softmax in self._softmaxes.items():
            if leaves_out:
                s_cN.masked_fill_(self._targets.others(tile), -torch.inf)
            yield leaves_out, softmax


def _dot(left_cN: torch.Tensor, right_cN: torch.Tensor) -> torch.Tensor:
    # Row by row: one sum over a whole tile would lose digits.
    return torch.bmm(left_cN[:, None], right_cN[:, :, None]).sum()
