"""Laws of the plan, over random sets, cluster shapes and windows."""

from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from audiotext_dist.data.plan import Plan, Slot, check_lanes, default_num_lanes, evaluation_slots
from audiotext_dist.errors import UserError


@st.composite
def plans(draw, weights=(1.0,)):
    num_sets = draw(st.integers(1, 3))
    set_sizes = [draw(st.lists(st.integers(1, 30), min_size=1, max_size=8)) for _ in range(num_sets)]
    set_weights = [draw(st.sampled_from(weights)) for _ in range(num_sets)]
    total = sum(int(sum(sizes) * weight) for sizes, weight in zip(set_sizes, set_weights, strict=True))
    assume(total)
    num_lanes = draw(st.sampled_from([lanes for lanes in (1, 2, 3, 6, 16, 48, 64) if lanes <= total]))
    arguments = {
        "set_sizes": set_sizes,
        "set_weights": set_weights,
        "seed": draw(st.integers(0, 5)),
        "epoch": draw(st.integers(0, 5)),
        "global_batch_size": num_lanes * draw(st.integers(1, min(3, total // num_lanes))),
        "num_lanes": num_lanes,
        "window_shards": draw(st.integers(1, 4)),
    }
    return Plan(**arguments), arguments


def world_sizes(num_lanes: int):
    return st.sampled_from([size for size in range(1, num_lanes + 1) if num_lanes % size == 0])


def epoch_slots(plan: Plan) -> list[Slot]:
    return [slot for number in range(plan.num_batches) for slot in plan.batch(number)]


@settings(deadline=None, max_examples=150)
@given(plans())
def test_each_row_at_most_once_and_only_the_tail_is_left_out(found):
    plan, arguments = found
    counts = Counter(epoch_slots(plan))
    total = sum(sum(sizes) for sizes in arguments["set_sizes"])
    assert set(counts.values()) == {1}
    assert total - counts.total() < arguments["global_batch_size"]
    assert plan.num_batches == total // arguments["global_batch_size"]
    sizes = [size for sizes in arguments["set_sizes"] for size in sizes]
    assert all(0 <= slot.row < sizes[slot.shard] for slot in counts)


@settings(deadline=None, max_examples=80)
@given(plans(), st.data())
def test_global_batches_do_not_depend_on_the_number_of_ranks(found, data):
    plan, arguments = found
    world_size = data.draw(world_sizes(arguments["num_lanes"]))
    number = data.draw(st.integers(0, plan.num_batches - 1))
    by_rank = [plan.batch(number, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len({len(slots) for slots in by_rank}) == 1
    assert [slot for slots in by_rank for slot in slots] == plan.batch(number)


@settings(deadline=None, max_examples=60)
@given(plans(), st.data())
def test_any_batch_is_the_same_without_those_before_it(found, data):
    plan, arguments = found
    epoch = [plan.batch(number) for number in range(plan.num_batches)]
    number = data.draw(st.integers(0, plan.num_batches - 1))
    assert Plan(**arguments).batch(number) == epoch[number]


@settings(deadline=None, max_examples=60)
@given(plans(weights=(0.5, 1.0, 2.0)), st.data())
def test_a_run_that_goes_on_with_other_ranks_keeps_its_order(found, data):
    plan, arguments = found
    stopped_at = data.draw(st.integers(0, plan.num_batches))
    before, after = (data.draw(world_sizes(arguments["num_lanes"])) for _ in range(2))

    def read(number):
        # Each start of the job makes a plan of its own.
        world_size = before if number < stopped_at else after
        own = Plan(**arguments)
        return [slot for rank in range(world_size) for slot in own.batch(number, rank=rank, world_size=world_size)]

    assert [read(number) for number in range(plan.num_batches)] == [plan.batch(n) for n in range(plan.num_batches)]


def test_the_first_batch_costs_the_same_wherever_a_run_goes_on(monkeypatch):
    """1 M clips: as many shards' rows are shuffled at nine tenths of the epoch as at its start."""

    def shuffled(number: int, batch_size: int = 256) -> int:
        plan = Plan(
            set_sizes=[[250] * 4000],
            set_weights=[1.0],
            seed=0,
            epoch=0,
            global_batch_size=batch_size,
            num_lanes=64,
            window_shards=4,
        )
        entries = []
        slots_of = Plan._slots_of
        monkeypatch.setattr(Plan, "_slots_of", lambda self, *entry: entries.append(entry) or slots_of(self, *entry))
        plan.batch(plan.num_batches * number // 10)
        monkeypatch.undo()
        return len(entries)

    assert shuffled(0) == 64 * 4
    # A place of a lane's batch can lie on either side of a window's end.
    assert shuffled(9) <= 64 * 4 * 2


@settings(deadline=None, max_examples=40)
@given(plans(weights=(0.3, 1.0, 1.7)))
def test_every_epoch_has_as_many_batches_and_every_seed(found):
    plan, arguments = found
    for epoch in range(6, 9):
        assert Plan(**{**arguments, "epoch": epoch, "seed": epoch}).num_batches == plan.num_batches


@settings(deadline=None, max_examples=60)
@given(plans(), st.data())
def test_a_lane_reads_few_shards_at_a_time(found, data):
    plan, arguments = found
    lanes, lane_batch = arguments["num_lanes"], arguments["global_batch_size"] // arguments["num_lanes"]
    lane = data.draw(st.integers(0, lanes - 1))
    batches = [plan.batch(number, rank=lane, world_size=lanes) for number in range(plan.num_batches)]
    slots = [slot for batch in batches for slot in batch]
    assert all(len(batch) == lane_batch for batch in batches)
    for shard in {slot.shard for slot in slots}:
        places = [place for place, slot in enumerate(slots) if slot.shard == shard]
        between = {slot.shard for slot in slots[places[0] : places[-1] + 1]}
        assert len(between) <= arguments["window_shards"]


@settings(deadline=None, max_examples=100)
@given(plans(weights=(0.25, 0.5, 1.0, 1.5, 2.0, 3.0)))
def test_weights_are_exact(found):
    _, arguments = found
    # One lane and batches of one leave no tail: the whole stream is seen.
    whole = Plan(**{**arguments, "num_lanes": 1, "global_batch_size": 1})
    slots = epoch_slots(whole)
    assert len(set(slots)) == len(slots), "each appearance of a row has a copy number of its own"
    counts = Counter(Slot(shard=slot.shard, row=slot.row) for slot in slots)
    first_shard = 0
    for sizes, weight in zip(arguments["set_sizes"], arguments["set_weights"], strict=True):
        own = {slot: count for slot, count in counts.items() if first_shard <= slot.shard < first_shard + len(sizes)}
        assert sum(own.values()) == round(int(weight) * sum(sizes) + round((weight % 1) * sum(sizes)))
        assert all(int(weight) <= count <= int(weight) + 1 for count in own.values())
        first_shard += len(sizes)


def test_epochs_and_seeds_have_orders_of_their_own_and_drop_other_tails():
    def slots(seed, epoch):
        arguments = {"set_sizes": [[25] * 4], "set_weights": [1.0], "num_lanes": 4, "window_shards": 2}
        return epoch_slots(Plan(seed=seed, epoch=epoch, global_batch_size=16, **arguments))

    assert slots(0, 0) == slots(0, 0)
    assert slots(0, 0) != slots(0, 1)
    assert slots(0, 0) != slots(1, 0)
    assert set(slots(0, 0)) != set(slots(0, 1))


def test_a_single_shard_is_mixed_over_all_lanes():
    def first_halves(epoch):
        plan = Plan(
            set_sizes=[[64]], set_weights=[1.0], seed=0, epoch=epoch, global_batch_size=8, num_lanes=2, window_shards=4
        )
        return [{slot.row for slot in plan.batch(number, rank=0, world_size=2)} for number in range(8)]

    rows_of_rank_0 = [set().union(*first_halves(epoch)) for epoch in range(4)]
    assert len({frozenset(rows) for rows in rows_of_rank_0}) == 4
    assert all(rows != set(range(32)) for rows in rows_of_rank_0)


def test_ranks_that_do_not_divide_the_lanes_are_told_which_numbers_would_do():
    with pytest.raises(
        UserError,
        match=r"3 processes cannot share data.num_lanes=32 evenly: start one of \[1, 2, 4, 8, 16, 32\] processes, or, "
        r"for a new run, set data.num_lanes to one of \[3, 6, 12, 24, 48, 96\]",
    ):
        check_lanes(global_batch_size=96, num_lanes=32, world_size=3)
    with pytest.raises(UserError, match=r"for a new run, set training\.global_batch_size to a multiple of 5"):
        check_lanes(global_batch_size=96, num_lanes=32, world_size=5)
    with pytest.raises(UserError, match="does not divide"):
        check_lanes(global_batch_size=96, num_lanes=64, world_size=2)
    check_lanes(global_batch_size=96, num_lanes=default_num_lanes(96), world_size=8)


def test_too_few_samples_name_the_batch_that_would_do():
    with pytest.raises(UserError, match="global_batch_size to at most 5"):
        Plan(set_sizes=[[2, 3]], set_weights=[1.0], seed=0, epoch=0, global_batch_size=8, num_lanes=8, window_shards=1)


@given(st.lists(st.integers(0, 9), max_size=6), st.integers(1, 7))
def test_evaluation_takes_every_row_once(sizes, world_size):
    dealt = [slot for rank in range(world_size) for slot in evaluation_slots(sizes, rank=rank, world_size=world_size)]
    assert Counter(dealt) == Counter(Slot(shard=s, row=r) for s, size in enumerate(sizes) for r in range(size))
