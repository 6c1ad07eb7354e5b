"""Every kind of target on real ranks, against the naive loss of the whole batch. Runs in a rank's process."""

import dataclasses

import open_clip.loss
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from audiotext_dist.losses.config import LossConfig
from audiotext_dist.losses.contrastive import Teachers, contrastive_loss
from audiotext_dist.losses.frame_match import match_frames
from audiotext_dist.losses.gather import gather_rows, reduce_scatter_rows, row_layout
from audiotext_dist.losses.targets import join_teachers, recording_ids
from audiotext_dist.models.dual_encoder import ModelInputs
from audiotext_dist.training import step
from tests.losses.naive import naive_figures, naive_loss
from tests.losses.small_model import DIM, AveragingEngine, SmallModel, gradients, watch

NUM_ROWS = 24
RECORDINGS = [f"youtube:{row % 9 if row < 20 else row}" for row in range(NUM_ROWS)]  # shared across every split
FORMS = ("mean_over_pairs", "mean_a_row", "left_out")
CONFIGS = {
    "pair": LossConfig(),
    "one direction": LossConfig(direction="first_to_second"),
    "other direction": LossConfig(direction="second_to_first", teacher_weight=0.5),
    **{form: LossConfig(pair_weight=0, recording_weight=1, recording_form=form) for form in FORMS},
    "teachers": LossConfig(pair_weight=0, teacher_weight=1),
    **{f"sum, {form}": LossConfig(recording_weight=0.7, recording_form=form, teacher_weight=1.5) for form in FORMS},
    "sigmoid": LossConfig(name="sigmoid"),
    "sigmoid, pairs": LossConfig(name="sigmoid", pair_weight=0.3, recording_weight=0.7),
    "sigmoid, left out": LossConfig(name="sigmoid", recording_weight=0.7, recording_form="left_out"),
}
FRAME_CONFIGS = {
    "nearest": LossConfig(frame_match="nearest"),
    "nearest, mean_a_row": LossConfig(frame_match="nearest", recording_weight=1, recording_form="mean_a_row"),
    "maximum": LossConfig(frame_match="maximum"),
    "maximum, left_out": LossConfig(frame_match="maximum", recording_weight=0.7, recording_form="left_out"),
    "maximum, teachers": LossConfig(frame_match="maximum", teacher_weight=1.5),
    "maximum, sigmoid": LossConfig(frame_match="maximum", name="sigmoid"),
}
COUNTS = {  # rows of each rank: even, uneven, with a rank that has none
    1: [[24]],
    2: [[12, 12], [7, 17]],
    3: [[8, 8, 8], [0, 23, 1]],
    4: [[6, 6, 6, 6], [5, 0, 12, 7]],
}


def rows(seed: int, num_rows: int = NUM_ROWS, dim: int = DIM, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(num_rows, dim, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def second_side(config: LossConfig) -> torch.Tensor:
    """A row a clip, or three frames."""
    return rows(2) if config.frame_match == "one" else rows(2, 3 * NUM_ROWS).reshape(NUM_ROWS, 3, DIM)


def raw_teachers() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(rows(10, dim=6), rows(11, dim=6)), (rows(12, dim=3), rows(13, dim=3))]


def whole_batch(config: LossConfig) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss, gradients and figures of the naive loss."""
    model = SmallModel(bias=config.name == "sigmoid")
    a, b = model(ModelInputs(waveform_NS=rows(1), tokens_NC=second_side(config)))
    batch = (config, a, b, model.scale(), model.logit_bias, RECORDINGS, raw_teachers())
    loss = naive_loss(*batch)
    loss.backward()
    return loss.detach(), [*gradients(model), _in_order(naive_figures(*batch))]


def _in_order(figures: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([figures[name].detach() for name in sorted(figures)])


def ranks_of_group(config: LossConfig, own: slice, group, num_micro_batches: int) -> tuple[float, list[torch.Tensor]]:
    """Loss, averaged gradients and figures of this rank's rows in its group."""
    model = SmallModel(bias=config.name == "sigmoid")
    losses, figures = [], []

    def loss_of(a, b, scale, bias):
        output = contrastive_loss(
            a,
            match_frames(a, b, config)[0],
            scale,
            config,
            bias=bias,
            recording_n=recording_ids(RECORDINGS)[own],
            teachers=Teachers(
                *(join_teachers([one[own] for one in side]) for side in zip(*raw_teachers(), strict=True))
            ),
            group=group,
        )
        losses.append(output.loss.detach())
        figures.append(_in_order(output.figures))
        return output

    engine = AveragingEngine(model, num_micro_batches, group)
    inputs = ModelInputs(waveform_NS=rows(1)[own], tokens_NC=second_side(config)[own])
    step.update(engine, model, inputs, loss_of, watch())
    for value in (losses[0], figures[0]):
        dist.all_reduce(value, group=group)
        value /= dist.get_world_size(group)
    return losses[0], [*gradients(model), figures[0]]


def every_case(rank: int) -> list[tuple[str, float]]:
    """What each case is called, and how far its loss and gradients are from the naive ones."""
    # The mean that a step logs is over every rank, of which a group is only a part.
    step.mean_over_ranks = lambda values: values
    configs = CONFIGS | {name: FRAME_CONFIGS[name] for name in ("nearest", "maximum, left_out", "maximum, sigmoid")}
    expected = {name: whole_batch(config) for name, config in configs.items()}
    groups = {size: dist.new_group(list(range(size))) for size in COUNTS}
    errors = []
    for size, splits in COUNTS.items():
        if rank >= size:
            continue
        for counts in splits:
            own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
            even = len(set(counts)) == 1
            for name, config in configs.items():
                # Tiles of one row, and of a few; micro-batches where the ranks have equal shares.
                for tile_bytes, num_micro_batches in ((1, 1), (3000, 3 if even else 1)):
                    tiled = dataclasses.replace(config, tile_bytes=tile_bytes)
                    found = ranks_of_group(tiled, own, groups[size], num_micro_batches)
                    label = f"{name}, counts {counts}, tiles of {tile_bytes} B, {num_micro_batches} micro-batches"
                    errors.append((label, distance(found, expected[name])))
    return errors


def distance(found, expected) -> float:
    """The greatest difference between two (loss, gradients), NaN where anything of them is."""
    pairs = zip([found[0], *found[1]], [expected[0], *expected[1]], strict=True)
    # torch's maximum, since Python's passes a NaN over.
    return float(torch.stack([(one - other).abs().max() for one, other in pairs]).max())


def open_clip_case(rank: int, world_size: int) -> list[tuple[str, float]]:
    """Against open_clip's own distributed losses, fp32."""
    own = slice(rank * NUM_ROWS // world_size, (rank + 1) * NUM_ROWS // world_size)
    inputs = ModelInputs(waveform_NS=rows(1, dtype=torch.float32)[own], tokens_NC=rows(2, dtype=torch.float32)[own])
    errors = []
    for name in ("softmax", "sigmoid"):
        models = [SmallModel(bias=name == "sigmoid", dtype=torch.float32) for _ in range(2)]
        (ours, theirs), results = models, []
        a, b = ours(inputs)
        loss = contrastive_loss(a, b, ours.scale(), LossConfig(name=name), bias=ours.logit_bias).loss
        a, b = theirs(inputs)
        place = {"rank": rank, "world_size": world_size}
        if name == "softmax":
            reference = open_clip.loss.ClipLoss(local_loss=True, gather_with_grad=True, **place)(a, b, theirs.scale())
        else:
            reference = open_clip.loss.SigLipLoss(dist_impl="gather", **place)(a, b, theirs.scale(), theirs.logit_bias)
        for model, value in ((ours, loss), (theirs, reference)):
            engine = AveragingEngine(model)
            engine.backward(value)
            engine.step()
            value = value.detach()
            dist.all_reduce(value)
            results.append((value / world_size, gradients(model)))
        errors.append((name, distance(*results)))
    return errors


def gather_case(rank: int) -> list[tuple[str, float]]:
    """A gathered row's gradient is the sum of what every rank of the group says of it, and nothing from outside."""
    members, counts = [1, 3], {1: 2, 3: 5}
    group = dist.new_group(members)
    if rank not in members:
        return []
    own = rows(rank, counts[rank]).requires_grad_()
    layout = row_layout(counts[rank], own.device, group)
    every = gather_rows(own, layout)
    expected = torch.cat([rows(member, counts[member]) for member in members])
    weights = {member: rows(20 + member, 7) for member in members}
    (every * weights[rank]).sum().backward()
    own_grad = sum(weights.values())[layout.own]
    scattered = reduce_scatter_rows(weights[rank], layout)
    return [
        ("gathered", float((every.detach() - expected).abs().max())),
        ("gradient", float((own.grad - own_grad).abs().max())),
        ("scattered", float((scattered - own_grad).abs().max())),
    ]


def uneven_and_masked(rank: int) -> list[tuple[str, float]]:
    """However the rows lie on the ranks, and whichever are masked: the loss is that of the rows that are left.

    hypothesis draws the same examples on every rank, and all of them fail together.
    """
    worst = []

    @settings(max_examples=25, derandomize=True, database=None, deadline=None, phases=[Phase.generate])
    @given(
        masks=st.lists(st.lists(st.booleans(), max_size=9), min_size=4, max_size=4),
        name=st.sampled_from(sorted(CONFIGS)),
        tile_bytes=st.integers(1, 4000),
        seed=st.integers(0, 99),
    )
    def each(masks, name, tile_bytes, seed):
        config = dataclasses.replace(CONFIGS[name], tile_bytes=tile_bytes)
        is_valid = torch.tensor([valid for mask in masks for valid in mask], dtype=torch.bool)
        a, b, teacher_a, teacher_b = (rows(seed + number, len(is_valid)) for number in range(4))
        # What a masked row holds must not matter, were it not even a number.
        a[~is_valid] = torch.nan
        names = [f"clip{row % 5}" for row in range(len(is_valid))]
        first = sum(map(len, masks[:rank]))
        own = slice(first, first + len(masks[rank]))
        leaves = [one.clone().requires_grad_() for one in (a[own], b[own], torch.tensor([4.0]).double())]
        bias = torch.tensor([-1.0]).double() if config.name == "sigmoid" else None
        loss = contrastive_loss(
            *leaves,
            config,
            bias=bias,
            recording_n=recording_ids(names)[own],
            teachers=Teachers(join_teachers([teacher_a[own]]), join_teachers([teacher_b[own]])),
            is_valid_n=is_valid[own],
        ).loss
        loss.backward()
        total = loss.detach().clone()
        dist.all_reduce(total)
        error = total.abs()
        if is_valid.any():
            kept = [one[is_valid].requires_grad_() for one in (a, b)]
            names = [name for name, valid in zip(names, is_valid, strict=True) if valid]
            teachers = [(teacher_a[is_valid], teacher_b[is_valid])]
            expected = naive_loss(config, *kept, torch.tensor([4.0]).double(), bias, names, teachers)
            expected.backward()
            error = (total / 4 - expected.detach()).abs()
            for leaf, one in zip(leaves, kept, strict=False):
                whole = torch.zeros(len(is_valid), DIM, dtype=torch.float64)
                whole[is_valid] = one.grad
                error = torch.stack([error, *(leaf.grad / 4 - whole[own]).abs().flatten()]).max()
        # A sum, since the ranks' maximum may pass a NaN over.
        dist.all_reduce(error)
        worst.append((f"{name}, {masks}, tiles of {tile_bytes} B", float(error)))
        assert error <= 1e-10, worst[-1]

    each()
    return worst


def on_four_ranks(rank: int) -> dict[str, list[tuple[str, float]]]:
    """All of the above in one start of the processes."""
    return {
        "open_clip": open_clip_case(rank, 4),
        "gather": gather_case(rank),
        "uneven": uneven_and_masked(rank),
        "naive": every_case(rank),
    }
