"""Which pairs of a batch belong together: its own pair, clips of one recording, what teachers say.

Shapes: n rows of this rank, N rows of all ranks, c rows of a tile, E embedding of the teachers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from audiotext_dist.losses.config import LossConfig
from audiotext_dist.losses.gather import RowLayout, gather_rows


def recording_ids(recordings: Sequence[str]) -> torch.Tensor:
    """A number for each recording, int64 [n]: equal for equal names in every process and data set.

    Two of N names meet by chance with probability N^2 / 2^65.
    """
    digests = (hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest() for name in recordings)
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests], dtype=torch.int64)


def join_teachers(embeddings: Sequence[torch.Tensor]) -> torch.Tensor:
    """One side's embeddings by M teachers, each float [n, E_m] -> unit rows [n, sum of E_m].

    The inner product of two joined rows is the mean over teachers of the cosines.
    """
    unit = [functional.normalize(embedding_nE, dim=1) for embedding_nE in embeddings]
    return torch.cat(unit, dim=1) / math.sqrt(len(unit))


TEACHER, TEACHER_ENTROPY = "teacher", "teacher_entropy"


@dataclass(frozen=True, kw_only=True)
class Positives:
    """A term whose target is 1 on some pairs and 0 on the others, before the pairs are weighed.

    share_N: what a positive pair of row, or of column, i counts in the loss of its rank, such that the mean over
    ranks is right. mass_N: the same, summed over the positive pairs of i.
    same_recording: the positives are all pairs of one recording; else each row's own pair alone.
    leaves_out: other pairs of one recording stay out of the denominator.
    """

    name: str
    weight: float
    share_N: torch.Tensor
    mass_N: torch.Tensor
    same_recording: bool = False
    leaves_out: bool = False


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The terms of a loss with 0/1 targets, on this rank's block.

    recording_N: number of each row's recording among the num_recordings of the batch; every row has its own where
    recordings are not told apart. count_N: rows that share row i's recording, itself included.
    """

    terms: list[Positives]
    layout: RowLayout
    recording_N: torch.Tensor
    num_recordings: int
    count_N: torch.Tensor

    @property
    def mask_bytes(self) -> int:
        """What the masks of a tile take an entry."""
        return int(any(term.same_recording or term.leaves_out for term in self.terms))

    def same_recording(self, tile: slice) -> torch.Tensor:
        """True where row and column share their recording, bool [c, N]."""
        return self.recording_N[self.layout.own][tile, None] == self.recording_N

    def others(self, tile: slice) -> torch.Tensor:
        """The same but for each row's own pair."""
        same_cN = self.same_recording(tile)
        self.own_pairs(same_cN, tile).fill_(False)
        return same_cN

    def own_pairs(self, block_cN: torch.Tensor, tile: slice) -> torch.Tensor:
        """The entries of a tile that stand for its rows' own pairs, a view [c]."""
        return block_cN.diagonal(self.columns_of(tile).start)

    def columns_of(self, tile: slice) -> slice:
        """The columns of a tile's own pairs, among all."""
        return slice(self.layout.first_own + tile.start, self.layout.first_own + tile.stop)

    def subtract(
        self, term: Positives, tile: slice, s_cN: torch.Tensor, g_cN: torch.Tensor, free_cN: torch.Tensor
    ) -> torch.Tensor:
        """Subtract a term's weighed targets from g_cN, overwriting free_cN; the sum of targets times scores."""
        share_c = term.share_N[self.layout.own][tile]
        if not term.same_recording:
            self.own_pairs(g_cN, tile).sub_(share_c, alpha=term.weight)
            return torch.dot(share_c, self.own_pairs(s_cN, tile))
        # Filled, since a CPU makes floats of a mask that it multiplies.
        different_cN = self.recording_N[self.layout.own][tile, None] != self.recording_N
        scores_c = free_cN.copy_(s_cN).masked_fill_(different_cN, 0.0).sum(dim=1)
        g_cN -= free_cN.copy_(term.weight * share_c[:, None]).masked_fill_(different_cN, 0.0)
        return torch.dot(share_c, scores_c)


def make_targets(
    config: LossConfig, layout: RowLayout, recording_n: torch.Tensor | None, like: torch.Tensor
) -> Targets:
    """Gather the recordings and count them. like: whose dtype and device the shares take."""
    one_N = like.new_full((layout.num_all,), layout.row_share)
    terms, recording_N = [], torch.arange(layout.num_all, device=like.device)
    num_recordings, count_N = layout.num_all, torch.ones_like(one_N)
    if recording_n is not None:
        gathered_N = gather_rows(recording_n, layout)
        _, recording_N, counts = torch.unique(gathered_N, return_inverse=True, return_counts=True)
        num_recordings, count_N = len(counts), counts[recording_N].to(like.dtype)
    if config.pair_weight:
        terms.append(Positives(name="pair", weight=config.pair_weight, share_N=one_N, mass_N=one_N))
    if config.recording_weight:
        share_N, mass_N = one_N, one_N
        if config.name == "softmax":
            match config.recording_form:
                case "mean_over_pairs":
                    share_N = torch.full_like(count_N, layout.world_size) / count_N.sum()
                    mass_N = share_N * count_N
                case "mean_a_row":
                    share_N = one_N / count_N
                case "left_out":
                    pass
        terms.append(
            Positives(
                name="recording",
                weight=config.recording_weight,
                share_N=share_N,
                mass_N=mass_N,
                same_recording=not config.leaves_out,
                leaves_out=config.leaves_out,
            )
        )
    return Targets(terms=terms, layout=layout, recording_N=recording_N, num_recordings=num_recordings, count_N=count_N)
