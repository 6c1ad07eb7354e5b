"""One training step: a batch through both towers, the loss over every rank's rows, one update.

With micro-batches the loss still sees the whole batch (Gao et al. 2021, arXiv:2101.06983):

1. Each micro-batch goes through the towers without gradient; the state of the random numbers before it is kept.
2. The loss of all embeddings gives the gradient with respect to each of them, and to temperature and bias.
3. Each micro-batch goes through the towers again, with the same random numbers, and those gradients go on from its
   embeddings into the towers. The last one averages the gradients over ranks and updates: one reduction a step. Only
   ZeRO 2, under which no rank holds a whole gradient to add to, reduces those of each micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from audiotext_dist.data.batch import Batch
from audiotext_dist.distributed import mean_over_ranks
from audiotext_dist.errors import UserError
from audiotext_dist.losses.config import LossConfig
from audiotext_dist.losses.contrastive import LossOutput, Teachers, contrastive_loss
from audiotext_dist.losses.frame_match import match_frames
from audiotext_dist.losses.targets import recording_ids
from audiotext_dist.models.dual_encoder import DualEncoder, ModelInputs
from audiotext_dist.training.engine import Engine
from audiotext_dist.training.health import MEND_OF_DIVERGENCE, HealthWatch, Sickness
from audiotext_dist.training.running_statistics import RunningStatistics

# Two sides, scale and bias of the scores -> the loss.
LossOf = Callable[[Tensor, Tensor, Tensor, Tensor | None], LossOutput]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The whole batch's loss, its figures (see ``LossOutput``), and 1 / temperature.

    gradient_norm: over all parameters, before clipping; None where there was no backward. loss_scale: of its backward,
    None without one. sickness: see health.py.
    """

    loss: float
    figures: dict[str, float]
    logit_scale: float
    gradient_norm: float | None
    loss_scale: float | None
    sickness: Sickness | None


def seed_step(seed: int, step: int, rank: int) -> None:
    """Dropout's numbers come from the seed, the step and the rank alone: a run that goes on draws what it would
    have drawn, without any saved state, and no two ranks draw the same.
    """
    words = np.random.SeedSequence([seed, step, rank])
    torch.manual_seed(int(words.generate_state(1, np.uint64)[0] >> 1))


def train_step(
    engine: Engine,
    model: DualEncoder,
    batch: Batch,
    health: HealthWatch,
    loss: LossConfig,
    epoch: int = 0,
    matmul_dtype: torch.dtype | None = None,
) -> StepResult:
    """Forward, backward and update; a sick step ends on every rank before the part that it would spoil."""
    recordings = recording_ids([metadata.recording for metadata in batch.metadata])
    teachers = None
    if batch.teacher_audio_BE is not None and batch.teacher_captions_BE is not None:
        teachers = Teachers(batch.teacher_audio_BE, batch.teacher_captions_BE)

    def loss_of(a_nD: Tensor, b_nD: Tensor, scale: Tensor, bias: Tensor | None) -> LossOutput:
        recording_n = recordings.to(a_nD.device)
        b_nD, frame_figures = match_frames(a_nD, b_nD, loss)
        output = contrastive_loss(
            a_nD, b_nD, scale, loss, bias=bias, recording_n=recording_n, teachers=teachers, matmul_dtype=matmul_dtype
        )
        return output._replace(figures=output.figures | frame_figures)

    return update(engine, model, model_inputs(batch, all_frames=loss.takes_all_frames(epoch)), loss_of, health)


def update(engine: Engine, model: DualEncoder, inputs: ModelInputs, loss_of: LossOf, health: HealthWatch) -> StepResult:
    """The step itself, on what the towers read and for any loss of their two sides."""
    num_micro_batches, statistics = engine.num_micro_batches, RunningStatistics(model)
    if num_micro_batches == 1:
        a_nD, b_nD = engine(inputs)
        output = loss_of(a_nD, b_nD, model.scale(), model.logit_bias)

        def move() -> float:
            _backward(engine, output.loss, model)
            return engine.step()

        return _finish(engine, output, model, health, statistics, move)
    micro_batches, random_states, embeddings = _split(inputs, num_micro_batches), [], []
    with torch.no_grad():
        for micro_batch in micro_batches:
            random_states.append(_RandomState.now(model.logit_scale.device))
            embeddings.append(model(micro_batch))
    statistics.restore()
    leaves = [torch.cat(side).requires_grad_() for side in zip(*embeddings, strict=True)]
    scalars = [value.detach().requires_grad_() for value in _scalars(model)]
    output = loss_of(leaves[0], leaves[1], scalars[0], scalars[1] if len(scalars) > 1 else None)

    def move_by_parts() -> float:
        gradient_norm = 0.0
        torch.autograd.backward(output.loss)
        gradients_of_sides = zip(*(_gradient(leaf).chunk(num_micro_batches) for leaf in leaves), strict=True)
        for micro_batch, random_state, gradients in zip(micro_batches, random_states, gradients_of_sides, strict=True):
            random_state.restore()
            surrogate = _inner_product(engine(micro_batch), gradients)
            # Scale and bias are in every micro-batch, so in the last one too, which is the one that is averaged.
            surrogate = surrogate + _inner_product(_scalars(model), map(_gradient, scalars)) / num_micro_batches
            _backward(engine, surrogate, model)
            gradient_norm = engine.step()
        return gradient_norm

    return _finish(engine, output, model, health, statistics, move_by_parts)


def _backward(engine: Engine, loss: Tensor, model: DualEncoder) -> None:
    """Activations that it computes again (engine.activation_checkpointing) are a forward that is not to count."""
    statistics = RunningStatistics(model)
    engine.backward(loss)
    statistics.restore()


def _finish(
    engine: Engine,
    output: LossOutput,
    model: DualEncoder,
    health: HealthWatch,
    statistics: RunningStatistics,
    move: Callable[[], float],
) -> StepResult:
    """Agree on the loss, then move the weights unless the step is sick; ``move`` returns the gradient's norm."""
    means = mean_over_ranks(torch.stack([output.loss.detach(), *output.figures.values()])).tolist()
    loss, figures, logit_scale = means[0], dict(zip(output.figures, means[1:], strict=True)), model.scale().item()
    sickness, gradient_norm, loss_scale = health.judge_loss(loss), None, engine.loss_scale
    if not health.is_skipped(sickness):
        gradient_norm = move()
        if not math.isfinite(gradient_norm):
            sickness = "overflow" if loss_scale is not None and loss_scale.can_fall else "gradient"
    if health.is_skipped(sickness):
        statistics.restore()
    return StepResult(
        loss=loss,
        figures=figures,
        logit_scale=logit_scale,
        gradient_norm=gradient_norm,
        loss_scale=None if loss_scale is None else loss_scale.value,
        sickness=sickness,
    )


def _split(inputs: ModelInputs, num_parts: int) -> list[ModelInputs]:
    parts = {name: value.chunk(num_parts) for name, value in vars(inputs).items() if value is not None}
    return [ModelInputs(**{name: chunks[part] for name, chunks in parts.items()}) for part in range(num_parts)]


def _scalars(model: DualEncoder) -> list[Tensor]:
    """Scale and, where there is one, bias of the scores."""
    return [model.scale()] if model.logit_bias is None else [model.scale(), model.logit_bias]


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def _inner_product(values: Iterable[Tensor], gradients: Iterable[Tensor]) -> Tensor:
    """Whose gradient with respect to each value is the one that is given."""
    return torch.stack([(value * grad).sum() for value, grad in zip(values, gradients, strict=True)]).sum()


@dataclass(frozen=True)
class _RandomState:
    """Of the generators that dropout and augmentation draw from."""

    cpu: Tensor
    device: torch.device
    accelerator: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> _RandomState:
        on_cuda = device.type == "cuda"
        return cls(torch.get_rng_state(), device, torch.cuda.get_rng_state(device) if on_cuda else None)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.cuda.set_rng_state(self.accelerator, self.device)


def check_finite_weights(model: DualEncoder, step: int) -> None:
    """Raise ``UserError`` if a weight is not finite: no checkpoint is made of it. The same on every rank."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise UserError(f"{name} is not finite after step {step}, and no checkpoint is made: {MEND_OF_DIVERGENCE}")


def model_inputs(batch: Batch, *, all_frames: bool = False) -> ModelInputs:
    """What the towers take of a batch; without all_frames, one frame stands for each clip."""
    frames, known = batch.frames_BHWC, batch.frame_embeddings_BD
    if all_frames:
        frames, known = None if frames is None else batch.frames_BLHWC, batch.frame_embeddings_BLD
    return ModelInputs(
        waveform_NS=batch.waveform_BS,
        num_valid_samples_N=batch.num_valid_samples_B,
        mask_uniforms_N4=batch.mask_uniforms_B4,
        frames_NHWC=frames,
        tokens_NC=batch.tokens_BC,
        image_embeddings_ND=known,
        text_embeddings_ND=batch.caption_embeddings_ND,
    )
