"""What the losses must equal: the whole batch in one process, its full square of scores, plain autograd."""

import dataclasses

import torch
from torch.nn import functional

from audiotext_dist.losses.config import LossConfig


def naive_loss(config: LossConfig, a, t, scale, bias=None, recording=None, teachers=None) -> torch.Tensor:
    """Row i of a with row i of t; recording: list; teachers: pairs of embeddings, one a teacher.

    t may be [N, L, D]: the best frame of each pair, or of each clip for its own sound.
    """
    logits = scale * _cosines(config, a, t)
    own, same = _pairs(len(a), recording)
    if config.name == "sigmoid":
        return _sigmoid(config, logits + bias, own, same)
    loss = torch.zeros((), dtype=a.dtype)
    row_weight, column_weight = {"both": (0.5, 0.5), "first_to_second": (1, 0), "second_to_first": (0, 1)}[
        config.direction
    ]
    for weight, scores, transposed in ((row_weight, logits, False), (column_weight, logits.T, True)):
        if config.pair_weight:
            loss = loss - weight * config.pair_weight * scores.log_softmax(1).diagonal().mean()
        if config.recording_weight:
            loss = loss - weight * config.recording_weight * _recording(config, scores, own, same)
        if config.teacher_weight:
            target = _teacher_scores(config, teachers, transposed).softmax(1)
            loss = loss + weight * config.teacher_weight * functional.cross_entropy(scores, target)
    return loss


def naive_figures(config: LossConfig, a, t, scale, bias, recording, teachers) -> dict[str, torch.Tensor]:
    """What a step logs beside the loss, of the same batch."""
    cosine = _cosines(config, a, t)
    own, same = _pairs(len(a), recording)
    found = {
        f"{term}_loss": naive_loss(_alone(config, term), a, t, scale, bias, recording, teachers)
        for term in ("pair", "recording", "teacher")
        if getattr(config, f"{term}_weight")
    }
    if config.teacher_weight:
        both = [_teacher_scores(config, teachers, transposed).log_softmax(1) for transposed in (False, True)]
        weights = config.direction_weights
        found["teacher_entropy"] = sum(
            -weight * (p.exp() * p).sum(1).mean() for weight, p in zip(weights, both, strict=True)
        )
        found["teacher_kl"] = found["teacher_loss"] - found["teacher_entropy"]
    return {
        **found,
        "recall_at_1": _found(cosine, own),
        "reverse_recall_at_1": _found(cosine.T, own),
        "positive_cosine": cosine[own].mean(),
        "negative_cosine": cosine[~same].mean(),
        "positives_a_row": same.to(a.dtype).sum(1).mean(),
    }


def _found(cosine, own):
    """The share of rows whose own pair is above every other; a tie is not."""
    others = cosine.masked_fill(own, -torch.inf).amax(1)
    return (cosine.diagonal() > others).to(cosine.dtype).mean()


def _cosines(config, a, t):
    if config.frame_match == "nearest":
        t = torch.stack(
            [frames[torch.stack([own @ frame for frame in frames]).argmax()] for own, frames in zip(a, t, strict=True)]
        )
    return a @ t.T if t.ndim == 2 else torch.einsum("nd,mld->nml", a, t).amax(dim=2)


def _alone(config, term):
    weights = {f"{name}_weight": float(name == term) for name in ("pair", "recording", "teacher")}
    form = config.recording_form if term == "recording" else LossConfig.recording_form
    return dataclasses.replace(config, recording_form=form, **weights)


def _pairs(num_rows, recording):
    own = torch.eye(num_rows, dtype=torch.bool)
    if recording is None:
        return own, own
    return own, torch.tensor([[one == other for other in recording] for one in recording])


def _teacher_scores(config, teachers, transposed):
    cosine = torch.stack(
        [functional.normalize(a_, dim=1) @ functional.normalize(t_, dim=1).T for a_, t_ in teachers]
    ).mean(dim=0)
    return (cosine.T if transposed else cosine) / config.teacher_temperature


def _recording(config, scores, own, same):
    match config.recording_form:
        case "mean_over_pairs":
            return scores.log_softmax(1)[same].mean()
        case "mean_a_row":
            return torch.stack([row[mask].mean() for row, mask in zip(scores.log_softmax(1), same, strict=True)]).mean()
        case "left_out":
            return scores.masked_fill(same & ~own, -torch.inf).log_softmax(1).diagonal().mean()


def _sigmoid(config, logits, own, same):
    def term(positive, asked):
        signs = torch.where(positive, 1.0, -1.0)
        return -(functional.logsigmoid(signs * logits) * asked).sum() / len(logits)

    loss = config.pair_weight * term(own, torch.ones_like(logits))
    if config.recording_weight and config.recording_form == "left_out":
        loss = loss + config.recording_weight * term(own, ~(same & ~own))
    elif config.recording_weight:
        loss = loss + config.recording_weight * term(same, torch.ones_like(logits))
    return loss
