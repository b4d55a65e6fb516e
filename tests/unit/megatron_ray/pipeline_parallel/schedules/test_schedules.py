"""Pipeline schedules: what they cost against the papers' formulas, what they hold, and
that they end on NCCL's terms.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ray.pipeline_parallel.schedules.actions import Action, Op, StageMap, in_units
from megatron_ray.pipeline_parallel.schedules.lowering import lower, lower_one
from megatron_ray.pipeline_parallel.schedules.orders import (
    PAIRED,
    ScheduleName,
    compute_orders,
    stage_map,
)
from megatron_ray.pipeline_parallel.schedules.simulation import (
    EQUAL,
    Costs,
    ScheduleError,
    ScheduleResult,
    peak_activations,
    simulate,
    simulate_computing,
)

GOLDEN = Path(__file__).parents[4] / "golden" / "schedule_bubbles.json"
"""Bubbles that no formula gives, by `name pp vpp microbatches`, at F = B = W = 1.
Written by `python -m tests.golden.schedule_bubbles`."""
Case = tuple[ScheduleName, int, int, int]


def cases(
    pipelines: tuple[int, ...], chunks: tuple[int, ...], *more: int
) -> Iterator[Case]:
    for pp in pipelines:
        for count in sorted({max(1, pp - 1), pp, pp + 1, 2 * pp - 1, 2 * pp, *more}):
            yield from (
                ("gpipe", pp, 1, count),
                ("1f1b", pp, 1, count),
                ("zb-h1", pp, 1, count),
                ("zb-v", pp, 2, count),
            )
            yield from (("interleaved", pp, vpp, count) for vpp in chunks)


SMALL = list(cases((1, 2, 3, 4, 8), (1, 2, 3, 4), 1, 2, 3, 12, 64))
MEDIUM = list(cases((16,), (1, 2, 3, 4), 1, 2, 3, 12, 64))
LARGE = [
    *cases((32, 64), (2, 8), 1),
    *cases((64,), (), 512),
    ("interleaved", 64, 8, 512),
    ("interleaved", 32, 4, 500),
]


def formula(case: Case, costs: Costs = EQUAL) -> float | None:
    """The bubble by the papers, where they give one."""
    name, pp, vpp, count = case
    whole = (pp - 1) * costs.microbatch
    if name in ("gpipe", "1f1b"):
        return whole
    if name == "interleaved":
        return whole / vpp if count % pp == 0 else None
    if name == "zb-v":
        lean = (pp - 1) * costs.forward / 2
        enough = 2 * pp
    else:
        lean = (pp - 1) * (costs.forward + costs.backward_input - costs.backward_weight)
        enough = 2 * pp - 1
    return (
        lean
        if count >= enough
        and costs.forward == costs.backward_input == costs.backward_weight
        else None
    )


def lower_bound(case: Case) -> float:
    """No schedule of the kind can do with less."""
    name, pp, vpp, _ = case
    return (pp - 1) * ({"zb-h1": 1.0, "zb-v": 0.5}.get(name, 3.0 / vpp))


def judged(case: Case) -> ScheduleResult:
    """Computing alone and lowered come to the same when transfers are free; with
    transfers that cost, it still ends.
    """
    name, pp, vpp, count = case
    stages = stage_map(name, pp, vpp)
    orders = compute_orders(name, pp, count, vpp)
    free = simulate_computing(orders, stages)
    lists = lower(orders, stages)
    assert simulate(lists, stages) == pytest.approx(free), (
        "the order of messages makes nobody wait"
    )
    assert (
        simulate(lists, stages, Costs(1.0, 1.3, 0.8, transfer=0.4)).makespan > free.makespan
        or pp == 1
    )
    return free


def check(case: Case, golden: dict[str, float]) -> None:
    result = judged(case)
    expected = formula(case)
    if expected is None:
        assert result.bubble >= lower_bound(case) - 1e-9, case
        expected = golden[key(case)]
    assert result.bubble == pytest.approx(expected, abs=1e-6), case


def key(case: Case) -> str:
    return " ".join(map(str, case))


@pytest.fixture(scope="module")
def golden() -> dict[str, float]:
    bubbles: dict[str, float] = json.loads(GOLDEN.read_text())
    return bubbles


def test_bubbles(golden: dict[str, float]) -> None:
    for case in SMALL:
        check(case, golden)


@pytest.mark.parity
@pytest.mark.parametrize("case", MEDIUM + LARGE, ids=key)
def test_bubbles_of_large_pipelines(case: Case, golden: dict[str, float]) -> None:
    check(case, golden)


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_formulas_hold_at_any_costs(name: ScheduleName) -> None:
    costs = Costs(1.0, 1.7, 0.6)
    for pp, count in ((2, 1), (4, 3), (4, 9), (8, 8)):
        result = simulate_computing(compute_orders(name, pp, count), StageMap(pp), costs)
        assert result.bubble == pytest.approx(formula((name, pp, 1, count), costs))


def test_every_action_is_there_once() -> None:
    for name, pp, vpp, count in SMALL + MEDIUM:
        apart = name in ("zb-h1", "zb-v")
        ops = (
            {Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT}
            if apart
            else {Op.FORWARD, Op.BACKWARD}
        )
        every = Counter(
            Action(op, chunk, microbatch)
            for op in ops
            for chunk in range(vpp)
            for microbatch in range(count)
        )
        for order in compute_orders(name, pp, count, vpp):
            assert Counter(order) == every


PAIRED_CASES: list[Case] = [case for case in SMALL if case[0] in PAIRED]


def test_pairs_take_no_more_time() -> None:
    """Passes in pairs wait for each other's inputs, for which one more warm-up suffices."""
    for name, pp, vpp, count in PAIRED_CASES:
        stages = stage_map(name, pp, vpp)
        orders = compute_orders(name, pp, count, vpp, in_pairs=True)
        result = simulate_computing(orders, stages)
        plain = simulate_computing(compute_orders(name, pp, count, vpp), stages)
        assert result.bubble == pytest.approx(plain.bubble)
        lists = lower(orders, stages)
        assert simulate(lists, stages) == pytest.approx(result)
        costs = Costs(1.0, 1.3, 0.8, transfer=0.4)
        assert simulate(lists, stages, costs).makespan >= result.makespan


def test_passes_of_a_pair_are_of_different_microbatches_and_side_by_side() -> None:
    for name, pp, vpp, count in PAIRED_CASES:
        stages = stage_map(name, pp, vpp)
        for order in lower(compute_orders(name, pp, count, vpp, in_pairs=True), stages):
            for unit in in_units(order):
                if len(unit) > 1:
                    forward, backward = unit
                    assert (forward.op, backward.op) == (Op.FORWARD, Op.BACKWARD)
                    assert forward.microbatch != backward.microbatch or vpp > 1


def test_a_long_step_is_in_pairs_but_for_warmup_and_cooldown() -> None:
    sizes: tuple[tuple[int, int, ScheduleName], ...] = (
        (1, 1, "1f1b"),
        (4, 1, "1f1b"),
        (4, 2, "interleaved"),
    )
    for pp, vpp, name in sizes:
        for rank, order in enumerate(compute_orders(name, pp, 32, vpp, in_pairs=True)):
            alone = 2 * (pp - rank - 1) + (vpp - 1) * pp + 1
            assert sum(action.is_paired for action in order) == 32 * vpp - alone


def test_what_is_held() -> None:
    """GPipe holds everything, 1F1B what is on its way, ZB-H1 and ZB-V (chunks of half a
    rank) nowhere more than 1F1B's first rank.
    """
    assert {peak_activations(order) for order in compute_orders("gpipe", 4, 32)} == {32}
    assert [peak_activations(order) for order in compute_orders("1f1b", 4, 32)] == [
        4,
        3,
        2,
        1,
    ]
    assert {peak_activations(order) for order in compute_orders("zb-h1", 4, 32)} == {4}
    assert {peak_activations(order) for order in compute_orders("zb-v", 4, 32, 2)} == {8}
    assert [
        peak_activations(order) for order in compute_orders("interleaved", 4, 32, 2)
    ] == [
        11,
        9,
        7,
        5,
    ], "Megatron's warm-up, and one"
    pairs = compute_orders("1f1b", 4, 32, in_pairs=True)
    assert [peak_activations(order) for order in pairs] == [8, 6, 4, 2]


def expected_peak(case: Case) -> int:
    """Microbatches of a chunk that the rank with most of them keeps: the first one, but
    for a short ZB-V.
    """
    name, pp, vpp, count = case
    if name == "gpipe":
        return count
    if name == "interleaved":
        largest_group = -(-count // max(1, count // pp))
        warmup = (pp - 1) * 2 + (vpp - 1) * largest_group
        return min(warmup + 1, count * vpp)
    return min(pp, count) * vpp


def test_peaks_follow_a_formula() -> None:
    for case in SMALL:
        name, pp, vpp, count = case
        peaks = [peak_activations(order) for order in compute_orders(name, pp, count, vpp)]
        assert max(peaks) == expected_peak(case), case


def test_the_order_of_megatron() -> None:
    order = compute_orders("interleaved", 2, 4, 2)[1]
    words = [
        f"{'F' if action.op is Op.FORWARD else 'B'}{action.chunk}{action.microbatch}"
        for action in order
    ]
    assert words == [
        "F00",
        "F01",
        "F10",
        "B10",
        "F11",
        "B11",
        "F02",
        "B00",
        "F03",
        "B01",
        "F12",
        "B12",
        "F13",
        "B13",
        "B02",
        "B03",
    ]


def test_one_ranks_list_is_that_of_all() -> None:
    some: tuple[Case, ...] = (
        ("gpipe", 2, 1, 3),
        ("interleaved", 4, 3, 9),
        ("zb-h1", 3, 1, 7),
    )
    for name, pp, vpp, count in some:
        orders = compute_orders(name, pp, count, vpp)
        stages = StageMap(pp, vpp)
        assert [lower_one(orders, stages, rank) for rank in range(pp)] == lower(
            orders, stages
        )


def test_receives_are_posted_shortly_before_their_use() -> None:
    """A rank of GPipe would else take in the whole batch's activations at once."""
    order = lower(compute_orders("gpipe", 2, 16), StageMap(2))[1]
    open_ = 0
    most = 0
    for action in order:
        open_ += (action.op is Op.RECV_FORWARD) - (action.op is Op.FORWARD)
        most = max(most, open_)
    assert most == 2


def test_stages_in_a_v() -> None:
    stages = StageMap(4, 2, "v")
    assert [stages.stage(rank, 1) for rank in range(4)] == [7, 6, 5, 4]
    assert [stages.rank_and_chunk(stage) for stage in (0, 3, 4, 7)] == [
        (0, 0),
        (3, 0),
        (3, 1),
        (0, 1),
    ]
    with pytest.raises(ValueError, match="vpp=3"):
        StageMap(4, 3, "v")


def test_a_deadlock_is_found_and_named() -> None:
    stages = StageMap(2)
    lists = lower(compute_orders("1f1b", 2, 2), stages)
    late = [action for action in lists[1] if action.op is not Op.SEND_BACKWARD]
    with pytest.raises(
        ScheduleError,
        match=r"the schedule deadlocks: rank 0 before BACKWARD of chunk 0, microbatch 0",
    ):
        simulate([lists[0], late], stages)
    backwards_first = [
        [Action(Op.BACKWARD, 0, 0), Action(Op.FORWARD, 0, 0)],
        compute_orders("1f1b", 2, 1)[1],
    ]
    with pytest.raises(ScheduleError, match="rank 0 at BACKWARD"):
        lower(backwards_first, stages)


def test_messages_out_of_order_are_found() -> None:
    stages = StageMap(2)
    lists = lower(compute_orders("gpipe", 2, 2), stages)
    swapped = list(lists[0])
    sends = [place for place, action in enumerate(swapped) if action.op is Op.SEND_FORWARD]
    swapped[sends[0]], swapped[sends[1]] = swapped[sends[1]], swapped[sends[0]]
    with pytest.raises(
        ScheduleError,
        match=r"rank 0 sends \('SEND_FORWARD', 0, 1\), but rank 1 waits for \('RECV_FORWARD', 0, "
        r"0\)",
    ):
        simulate([swapped, lists[1]], stages)
    with pytest.raises(ScheduleError, match="is the same on both sides"):
        simulate(
            [[Action(Op.SEND_FORWARD, 0, 0, 1)], [Action(Op.SEND_BACKWARD, 0, 0, 0)]],
            stages,
        )


@pytest.mark.parametrize(
    ("name", "vpp", "group", "words"),
    [
        ("1f1b", 2, None, "schedule 1f1b has one chunk per rank; vpp=2 needs interleaved"),
        ("zb-v", 1, None, "schedule zb-v has two chunks per rank, not vpp=1"),
        (
            "interleaved",
            2,
            2,
            "groups of 2 microbatches are smaller than the pipeline of 4 ranks",
        ),
        ("interleaved", 0, None, "must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(
    name: ScheduleName, vpp: int, group: int | None, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        compute_orders(name, 4, 8, vpp, group)


def test_zero_bubble_has_no_pairs() -> None:
    words = "schedule zb-h1 has no pairs; use one of 1f1b, interleaved"
    with pytest.raises(ValueError, match=words):
        compute_orders("zb-h1", 4, 8, in_pairs=True)
