"""What a recipe says of its loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from audiotext_dist.errors import UserError, require_positive


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The loss between the two sides of every pair of the global batch, a sum of up to three terms.

    name: ``softmax`` is cross-entropy between targets and the softmax of the scaled cosines (InfoNCE, the CLIP
    loss); ``sigmoid`` asks of every two clips alone whether they belong together (SigLIP, arXiv:2303.15343), with
    model.init_logit_bias.
    pair_weight: weight of the term whose target is each clip's own pair; 0 leaves the term out.
    recording_weight: the same for pairs of clips that share their recording, in whatever data set or rank, as
    recording_form says: ``mean_over_pairs`` is the mean over all such pairs of the batch, ``mean_a_row`` gives each
    row its mean over them, ``left_out`` has the own pair as target and keeps the others out of the denominator.
    teacher_weight: the same for the softmax of the teachers' mean cosine / teacher_temperature.
    direction: ``first_to_second`` finds, in the order of the task's name, the second side for each row of the first;
    ``both`` averages the two directions.
    frame_match (audio-image only): how a clip's frames stand for it (Temporal agreement). ``one`` is a random frame;
    ``nearest`` the own frame with the highest cosine to the sound; ``maximum`` takes the best frame for every pair of
    the batch; ``multiframe`` all frames against as many parts of the sound, with model.audio.num_outputs, so its clips
    are to be no longer than data.clip_seconds: frames are spread over a clip, parts over what is heard of it. Before
    the epoch frame_match_from_epoch, counted from 0, ``nearest`` and ``maximum`` are ``one``.
    tile_bytes: memory for tiles of the cosines; the more ranks and clips, the fewer rows a tile holds.
    """

    name: Literal["softmax", "sigmoid"] = "softmax"
    pair_weight: float = 1.0
    recording_weight: float = 0.0
    recording_form: Literal["mean_over_pairs", "mean_a_row", "left_out"] = "mean_over_pairs"
    teacher_weight: float = 0.0
    teacher_temperature: float = 0.05
    direction: Literal["both", "first_to_second", "second_to_first"] = "both"
    frame_match: Literal["one", "nearest", "maximum", "multiframe"] = "one"
    frame_match_from_epoch: int = 0
    tile_bytes: int = 1 << 28

    def __post_init__(self) -> None:
        require_positive(self, "loss", "teacher_temperature", "tile_bytes")
        weights = ("pair_weight", "recording_weight", "teacher_weight")
        for key in weights:
            value = getattr(self, key)
            if not 0 <= value < math.inf:
                raise UserError(f"loss.{key}={value} must be 0 or more")
        if not any(getattr(self, key) for key in weights):
            raise UserError("the loss has no term: set loss.pair_weight, loss.recording_weight or loss.teacher_weight")
        if self.frame_match_from_epoch < 0:
            raise UserError(f"loss.frame_match_from_epoch={self.frame_match_from_epoch} must not be negative")
        if self.frame_match_from_epoch and self.frame_match in ("one", "multiframe"):
            raise UserError(
                f"loss.frame_match={self.frame_match} is the same in every epoch: set "
                "loss.frame_match_from_epoch=0, or loss.frame_match=nearest"
            )
        if self.name == "sigmoid":
            self._check_sigmoid()

    def takes_all_frames(self, epoch: int) -> bool:
        """Whether the loss of this epoch, counted from 0, sees every frame of a clip."""
        return self.frame_match != "one" and epoch >= self.frame_match_from_epoch

    def _check_sigmoid(self) -> None:
        if self.teacher_weight:
            raise UserError(
                f"loss.name=sigmoid takes no softmaxed targets, but loss.teacher_weight={self.teacher_weight}: "
                "set it to 0, or loss.name=softmax"
            )
        if self.direction != "both":
            raise UserError(
                f"loss.name=sigmoid has no directions, but loss.direction={self.direction}: "
                "set it to both, or loss.name=softmax"
            )
        if self.recording_weight and self.recording_form == "mean_a_row":
            raise UserError(
                "loss.name=sigmoid weighs every pair alike, it has no loss.recording_form=mean_a_row: "
                "set mean_over_pairs or left_out"
            )

    @property
    def direction_weights(self) -> tuple[float, float]:
        """Weight of the rows, which find the second side, and of the columns, which find the first."""
        match self.direction:
            case "both":
                return 0.5, 0.5
            case "first_to_second":
                return 1.0, 0.0
            case "second_to_first":
                return 0.0, 1.0

    @property
    def leaves_out(self) -> bool:
        """True where the recording term has a denominator of its own."""
        return self.recording_weight > 0 and self.recording_form == "left_out"
