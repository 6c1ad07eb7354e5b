"""The contrastive losses, in one block a rank (Temporal agreement, Eq. 1; Correspondences, stages 1 and 2; SigLIP).

Shapes: n rows of this rank, N rows of all ranks, D embedding, E embedding of the teachers, c rows of a tile.

1. Gather the other side once, t_ND. This rank's block of scores is S = (scale * a_nD) @ t_ND^T.
2. Make the loss and its gradient G with respect to S tile by tile (``softmax``, ``sigmoid``): see there.
3. Then d a = scale * G @ t, and d t = G^T @ (scale * a), whose sum over ranks is scattered back to the rows' owners.

So memory is a tile and a few [N, D], never [n, N]; there are four matmuls and one gather, and every
collective is in the forward: a rank that decides to skip the backward leaves no other one waiting.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from audiotext_dist.losses.block import Block, BlockLoss
from audiotext_dist.losses.config import LossConfig
from audiotext_dist.losses.frame_match import FramesBlock
from audiotext_dist.losses.gather import RowLayout, gather_rows, reduce_scatter_rows, row_layout
from audiotext_dist.losses.sigmoid import sigmoid_loss
from audiotext_dist.losses.softmax import softmax_loss
from audiotext_dist.losses.targets import TEACHER, TEACHER_ENTROPY, Targets, make_targets

DEFAULT = LossConfig()


class LossOutput(NamedTuple):
    """The mean over ranks of each of these is that of the whole batch.

    loss: carries the gradient. figures: what to log, each a scalar: ``NAME_loss`` of each term before its weight,
    ``recall_at_1``, the share of rows whose own pair scores above all others, and ``reverse_recall_at_1``, of columns;
    ``positive_cosine`` and ``negative_cosine``, means over the own pairs and over those of different recordings;
    ``positives_a_row``, rows of one recording, itself included; ``teacher_entropy`` and ``teacher_kl`` (nats) where
    there are teachers.
    """

    loss: torch.Tensor
    figures: dict[str, torch.Tensor]


class Teachers(NamedTuple):
    """What teachers say of the two sides of this rank's rows, [n, E] each: see ``targets.join_teachers``."""

    a_nE: torch.Tensor
    t_nE: torch.Tensor


def contrastive_loss(
    a_nD: torch.Tensor,
    t_nD: torch.Tensor,
    scale: torch.Tensor,
    config: LossConfig = DEFAULT,
    *,
    bias: torch.Tensor | None = None,
    recording_n: torch.Tensor | None = None,
    teachers: Teachers | None = None,
    is_valid_n: torch.Tensor | None = None,
    matmul_dtype: torch.dtype | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> LossOutput:
    """The loss over the rows of every rank; row i of one side pairs with row i of the other.

    The mean over ranks of the returned losses is the loss of the whole batch. An engine that averages
    gradients over ranks, as DeepSpeed does, gets the whole batch's gradient for every parameter, the
    temperature included. Ranks may hold different numbers of rows, or none.

    Args:
        a_nD, t_nD: this rank's L2-normalised embeddings, float32 or float64; t_nD may be [n, L, D], whose row scores as
            the best of its L frames.
        scale: [1], 1 / temperature.
        bias: [1], of ``sigmoid`` alone.
        recording_n: int64, from ``targets.recording_ids``; needed by the recording term.
        teachers: needed by the teacher term.
        is_valid_n: bool; a row without it is as if it were not there.
        matmul_dtype: bfloat16 lets matmuls read so; sums stay as the embeddings are.
        group: None is every rank.
    """
    assert len(a_nD) == len(t_nD), "one row a side for each clip"
    assert scale.shape == (1,)
    assert (bias is not None) == (config.name == "sigmoid")
    assert recording_n is not None or not config.recording_weight
    assert teachers is not None or not config.teacher_weight
    if is_valid_n is not None:
        a_nD, t_nD = a_nD[is_valid_n], t_nD[is_valid_n]
        recording_n = None if recording_n is None else recording_n[is_valid_n]
        teachers = None if teachers is None else Teachers(*(side_nE[is_valid_n] for side_nE in teachers))
    x_nD = scale * a_nD
    with torch.no_grad():
        layout = row_layout(len(x_nD), x_nD.device, group)
        targets = make_targets(config, layout, recording_n, like=x_nD)
        kind = Block if t_nD.ndim == 2 else FramesBlock
        block = kind(x_nD, gather_rows(t_nD.to(matmul_dtype or t_nD.dtype), layout))
        if config.name == "sigmoid":
            assert bias is not None
            made = sigmoid_loss(block, targets, bias, config)
        else:
            made = softmax_loss(block, targets, _teacher_block(teachers, layout, config, like=x_nD), config)
        grad_t_nD = reduce_scatter_rows(block.grad_t_ND, layout)
        value = _weighted_sum(made.terms, targets, config)
    loss = _WithGradients.apply(  # type: ignore[no-untyped-call]
        value, [block.grad_x_nD, grad_t_nD, made.grad_bias], x_nD, t_nD, bias
    )
    return LossOutput(loss, _figures(made, targets, scale.detach().squeeze()))


def _teacher_block(
    teachers: Teachers | None, layout: RowLayout, config: LossConfig, like: torch.Tensor
) -> Block | None:
    if teachers is None or not config.teacher_weight:
        return None
    a_nE, t_nE = (side_nE.to(like.dtype) for side_nE in teachers)
    return Block(a_nE / config.teacher_temperature, gather_rows(t_nE, layout))


def _weighted_sum(terms: dict[str, torch.Tensor], targets: Targets, config: LossConfig) -> torch.Tensor:
    weights = {term.name: term.weight for term in targets.terms} | {TEACHER: config.teacher_weight}
    return torch.stack([weight * terms[name] for name, weight in weights.items() if weight]).sum()


def _figures(made: BlockLoss, targets: Targets, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    terms, figures = dict(made.terms), dict(made.recalls)
    figures |= {f"{name}_cosine": score / scale for name, score in made.mean_scores.items()}
    figures["positives_a_row"] = targets.count_N.sum() / max(len(targets.count_N), 1)
    if TEACHER in terms:
        figures[TEACHER_ENTROPY] = terms.pop(TEACHER_ENTROPY)
        figures["teacher_kl"] = terms[TEACHER] - figures[TEACHER_ENTROPY]
    return figures | {f"{name}_loss": value for name, value in terms.items()}


class _WithGradients(torch.autograd.Function):
    """A value whose gradients with respect to its inputs are known already."""

    @staticmethod
    def forward(
        ctx: Any, value: torch.Tensor, gradients: list[torch.Tensor | None], *_: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_value: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Scaled in place: they are as large as the gathered embeddings, and asked for once.
        gradients = [None if gradient is None else gradient.mul_(grad_value) for gradient in ctx.gradients]
        del ctx.gradients
        return None, None, *gradients
