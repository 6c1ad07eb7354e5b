"""One training step: a batch through both towers, the loss over every rank's rows, one update."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from audiotext_dist.data.loader import Batch
from audiotext_dist.distributed import mean_over_ranks
from audiotext_dist.errors import UserError
from audiotext_dist.losses.contrastive import contrastive_loss
from audiotext_dist.models.dual_encoder import DualEncoder, ModelInputs
from audiotext_dist.training.engine import Engine
from audiotext_dist.training.health import MEND_OF_DIVERGENCE, HealthWatch, Sickness


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The whole batch's loss, the share of its clips that find their own pair first, and 1 / temperature.

    gradient_norm: over all parameters, before clipping; None where there was no backward. sickness: see health.py.
    """

    loss: float
    recall_at_1: float
    logit_scale: float
    gradient_norm: float | None
    sickness: Sickness | None


def train_step(engine: Engine, model: DualEncoder, batch: Batch, health: HealthWatch) -> StepResult:
    """Forward, backward and update; a sick step ends on every rank before the part that it would spoil."""
    a_nD, b_nD = engine(model_inputs(batch))
    scale = model.scale()
    output = contrastive_loss(a_nD, b_nD, scale)
    recall_at_1 = (output.own_rank_n == 0).float().mean()
    loss, recall = mean_over_ranks(torch.stack([output.loss.detach(), recall_at_1])).tolist()
    sickness, gradient_norm = health.judge_loss(loss), None
    if not health.is_skipped(sickness):
        engine.backward(output.loss)
        gradient_norm = engine.step()
        if not math.isfinite(gradient_norm):
            sickness = "gradient"
    return StepResult(
        loss=loss, recall_at_1=recall, logit_scale=scale.item(), gradient_norm=gradient_norm, sickness=sickness
    )


def check_finite_weights(model: DualEncoder, step: int) -> None:
    """Raise ``UserError`` if a weight is not finite: no checkpoint is made of it. The same on every rank."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise UserError(f"{name} is not finite after step {step}, and no checkpoint is made: {MEND_OF_DIVERGENCE}")


def model_inputs(batch: Batch) -> ModelInputs:
    """What the towers take of a batch; a clip's one chosen frame stands for it."""
    has_frames = batch.frames_BLHWC.shape[1] > 0
    return ModelInputs(
        waveform_NS=batch.waveform_BS,
        num_valid_samples_N=batch.num_valid_samples_B,
        mask_uniforms_N4=batch.mask_uniforms_B4,
        frames_NHWC=batch.frames_BLHWC[:, 0] if has_frames else None,
        tokens_NC=batch.tokens_BC,
        image_embeddings_ND=batch.frame_embeddings_BD,
        text_embeddings_ND=batch.caption_embeddings_ND,
    )
