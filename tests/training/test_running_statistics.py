"""What BatchNorm remembers is that of the batches that count, the same on every rank."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from audiotext_dist.distributed import mean_over_ranks
from audiotext_dist.losses.config import LossConfig
from audiotext_dist.losses.contrastive import contrastive_loss
from audiotext_dist.models.dual_encoder import ModelInputs
from audiotext_dist.training.running_statistics import average_running_statistics
from audiotext_dist.training.step import update
from tests.losses.cases import rows
from tests.losses.small_model import AveragingEngine, SmallModel, watch
from tests.ranks import run_on_ranks


class NormedModel(SmallModel):
    """Its first side is normalised by its batch; ``again`` in the backward too, to save its activations."""

    def __init__(self, *, again: bool) -> None:
        super().__init__(bias=False)
        self.again = again
        self.norm = nn.BatchNorm1d(rows(1).shape[1], dtype=torch.float64)

    def forward(self, inputs: ModelInputs):
        x_NS = inputs.waveform_NS
        normed_NS = checkpoint(self.norm, x_NS, use_reentrant=False) if self.again else self.norm(x_NS)
        return super().forward(ModelInputs(waveform_NS=normed_NS, tokens_NC=inputs.tokens_NC))


def stepped(waveform_NS: torch.Tensor, num_micro_batches: int, *, again: bool = False) -> nn.BatchNorm1d:
    model = NormedModel(again=again)
    update(
        AveragingEngine(model, num_micro_batches),
        model,
        ModelInputs(waveform_NS=waveform_NS, tokens_NC=rows(2)),
        lambda a, b, scale, bias: contrastive_loss(a, b, scale, LossConfig(), bias=bias),
        watch(),
    )
    return model.norm


@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_a_step_that_is_skipped_leaves_them(num_micro_batches):
    norm = stepped(rows(1) * torch.nan, num_micro_batches)
    assert torch.equal(norm.running_mean, torch.zeros_like(norm.running_mean))
    assert norm.num_batches_tracked == 0


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("num_micro_batches", [1, 2, 3])
def test_each_micro_batch_counts_once(num_micro_batches, again):
    alone = nn.BatchNorm1d(rows(1).shape[1], dtype=torch.float64)
    for part in rows(1).chunk(num_micro_batches):
        alone(part)
    norm = stepped(rows(1), num_micro_batches, again=again)
    torch.testing.assert_close(norm.running_mean, alone.running_mean)
    torch.testing.assert_close(norm.running_var, alone.running_var)
    assert norm.num_batches_tracked == num_micro_batches


def _averaged(rank: int) -> list[list[float]]:
    norm = nn.BatchNorm1d(2)
    norm(torch.tensor([[1.0, 2.0], [3.0, 6.0]]) * (rank + 1))
    own = [norm.running_mean.clone(), norm.running_var.clone()]
    average_running_statistics(nn.Sequential(nn.Linear(2, 2), norm))
    for found, mine in zip((norm.running_mean, norm.running_var), own, strict=True):
        torch.testing.assert_close(found, mean_over_ranks(mine))
        assert not torch.equal(found, mine)
    return [norm.running_mean.tolist(), norm.running_var.tolist()]


def test_every_rank_gets_the_mean_over_ranks():
    first, second = run_on_ranks(_averaged, 2)
    assert first == second
    # The momentum of 0.1 takes a tenth of the batch's mean: 2 on rank 0, 4 on rank 1.
    assert first[0] == pytest.approx([0.3, 0.6])
