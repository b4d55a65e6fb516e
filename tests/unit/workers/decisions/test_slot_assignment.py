"""Which processes go on, are promoted or started anew: on several nodes, with GPUs and
without.
"""

from typing import Literal

from megatron_ray.parallel_dims import ParallelDims
from workers.decisions.placement import PlacementPlan, RankPlace, SlotFacts
from workers.decisions.rank_map import assign_ranks
from workers.decisions.slot_assignment import (
    Slot,
    WorkerToStart,
    assign_slots,
    num_slots,
    spares_to_start,
)
from workers.decisions.topology.bundles import Bundle

TP = 2
DP = 2
"""Slots 0 and 1 in bundle 0 on node a, 2 and 3 in bundle 1 on node b, 4 and 5 for spares."""
DIMS = ParallelDims(tp=TP, dp=DP)
NODES = {0: "a", 1: "b"}


def plan(gpus: bool = True) -> PlacementPlan:
    accelerator: Literal["cpu", "gpu"] = "cpu"
    resources = {"CPU": 1.0}
    if gpus:
        accelerator = "gpu"
        resources["GPU"] = 1.0
    bundles = tuple(Bundle(index, {}, (index * TP, index * TP + 1)) for index in range(DP))
    return PlacementPlan(accelerator, bundles, resources, DIMS, capacity=DP)


def facts(
    slot: int, node: str, gpu: int | None = None, *, bundle: int = 0, is_spare: bool = False
) -> SlotFacts:
    return SlotFacts(
        slot=slot,
        bundle=bundle,
        node_id=node,
        address=f"10.0.0.{ord(node)}",
        pid=slot,
        gpu=gpu,
        is_spare=is_spare,
    )


def rank_map(gpus: bool = True) -> tuple[RankPlace, ...]:
    """GPU 6 and 7 on node a, 0 and 1 on node b."""
    rows = [(0, "a", 6, 0), (1, "a", 7, 0), (2, "b", 0, 1), (3, "b", 1, 1)]
    reported = []
    for slot, node, gpu, bundle in rows:
        report = facts(slot, node, gpu, bundle=bundle)
        if not gpus:
            report = report.model_copy(update={"gpu": None})
        reported.append(report)
    return assign_ranks(reported, DIMS)


def test_at_first_all_processes_are_started_and_get_their_gpus_from_ray() -> None:
    assignment = assign_slots(plan(), (), (), (), NODES)
    assert assignment.slots == dict.fromkeys(range(4))
    assert assignment.workers_to_start == tuple(
        WorkerToStart(slot, slot // TP, {"CPU": 1.0, "GPU": 1.0}) for slot in range(4)
    )
    assert num_slots(DIMS) == 6


def test_a_spare_takes_the_dead_ones_gpu() -> None:
    assignment = assign_slots(
        plan(),
        rank_map(),
        {0, 2, 3, 4, 5},
        [facts(4, "a", is_spare=True), facts(5, "b", is_spare=True)],
        NODES,
    )
    assert assignment.promoted == (4,)
    assert assignment.workers_to_start == ()
    assert assignment.released == ()
    assert assignment.slots == {0: Slot(0, 6), 4: Slot(0, 7), 2: Slot(1, 0), 3: Slot(1, 1)}
    reported = [
        facts(0, "a", 6),
        facts(4, "a", is_spare=True),
        facts(2, "b", 0, bundle=1),
        facts(3, "b", 1, bundle=1),
    ]
    places = assign_ranks(assignment.apply(reported), DIMS)
    assert {place.slot: (place.bundle, place.gpu) for place in places} == {
        0: (0, 6),
        4: (0, 7),
        2: (1, 0),
        3: (1, 1),
    }


def test_without_a_spare_on_the_node_a_new_process_takes_the_gpu() -> None:
    """Ray would give it any GPU that its books call free, and a promoted spare may be
    using that.
    """
    assignment = assign_slots(
        plan(), rank_map(), {0, 1, 3, 4}, [facts(4, "a", is_spare=True)], NODES
    )
    assert assignment.workers_to_start == (WorkerToStart(2, 1, {"CPU": 1.0}),)
    assert assignment.promoted == ()
    assert assignment.slots[2] == Slot(1, 0)


def test_two_deaths_and_one_spare() -> None:
    assignment = assign_slots(
        plan(), rank_map(), {2, 3, 4}, [facts(4, "a", is_spare=True)], NODES
    )
    assert assignment.promoted == (4,)
    assert assignment.slots[4] == Slot(0, 6)
    assert assignment.workers_to_start == (WorkerToStart(0, 0, {"CPU": 1.0}),)
    assert assignment.slots[0] == Slot(0, 7)


def test_a_bundle_that_moved_gets_its_gpus_from_ray_again() -> None:
    assignment = assign_slots(
        plan(), rank_map(), {0, 1, 4}, [facts(4, "a", is_spare=True)], {0: "a", 1: "c"}
    )
    assert assignment.workers_to_start == tuple(
        WorkerToStart(slot, 1, {"CPU": 1.0, "GPU": 1.0}) for slot in (2, 3)
    )
    assert assignment.slots == {0: Slot(0, 6), 1: Slot(0, 7), 2: None, 3: None}
    assert assignment.released == ()


def test_half_started_processes_are_used_and_those_that_fit_nowhere_are_released() -> None:
    half = [facts(0, "a", 6), facts(3, "x", 1, bundle=1)]
    assignment = assign_slots(plan(), (), {0, 3, 5}, half, NODES)
    assert assignment.slots == dict.fromkeys((0, 1, 2, 4))
    assert [worker.slot for worker in assignment.workers_to_start] == [1, 2, 4]
    assert assignment.released == (3, 5), (
        "one on another node, and one that does not answer"
    )


def test_on_cpu_a_successor_that_was_never_a_rank_is_used_again() -> None:
    assignment = assign_slots(
        plan(gpus=False), rank_map(gpus=False), {0, 2, 3, 1}, [], NODES
    )
    assert assignment.workers_to_start == ()
    assert set(assignment.slots) == {0, 1, 2, 3}
    assignment = assign_slots(
        plan(gpus=False), rank_map(gpus=False), {0, 2, 3, 4}, [facts(4, "a")], NODES
    )
    assert assignment.slots[4] == Slot(0, None)
    assert assignment.promoted == ()


def test_one_spare_on_each_node() -> None:
    spares = spares_to_start(plan(), rank_map(), {0, 1, 2, 3}, ())
    assert spares == [
        WorkerToStart(4, 0, {}, is_spare=True),
        WorkerToStart(5, 1, {}, is_spare=True),
    ]
    assert spares_to_start(plan(), rank_map(), {0, 4, 2, 3, 5}, ["b"]) == [
        WorkerToStart(1, 0, {}, is_spare=True)
    ]
    assert spares_to_start(plan(), rank_map(), range(6), ["a", "b"]) == []
