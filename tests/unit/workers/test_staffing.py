"""Who serves, who steps in, who is made anew: on one node and on several, with GPUs and
without.
"""

from megatron_ray.parallel_dims import ParallelDims
from workers.decisions.placement import (
    Bundle,
    PlacementPlan,
    RankPlace,
    SlotFacts,
    assign_ranks,
)
from workers.decisions.slot_assignment import (
    Slot,
    WorkerToStart,
    assign_slots,
    num_slots,
    standbys_wanted,
)

TP = 2
DP = 2
"""Slots 0 and 1 in bundle 0 on node a, 2 and 3 in bundle 1 on node b, 4 and 5 for those
that stand by."""
DIMS = ParallelDims(tp=TP, dp=DP)
NODES = {0: "a", 1: "b"}


def plan(gpus: bool = True) -> PlacementPlan:
    resources = {"CPU": 1.0, "GPU": 1.0} if gpus else {"CPU": 1.0}
    bundles = tuple(Bundle(index, {}, (index * TP, index * TP + 1)) for index in range(DP))
    return PlacementPlan("gpu" if gpus else "cpu", bundles, resources, DIMS, room=DP)


def facts(
    slot: int, node: str, gpu: int | None = None, *, bundle: int = 0, standby: bool = False
) -> SlotFacts:
    return SlotFacts(
        slot=slot,
        bundle=bundle,
        node_id=node,
        address=f"10.0.0.{ord(node)}",
        pid=slot,
        gpu=gpu,
        standby=standby,
    )


def the_map(gpus: bool = True) -> tuple[RankPlace, ...]:
    """GPU 6 and 7 on node a, 0 and 1 on node b."""
    found = [(0, "a", 6, 0), (1, "a", 7, 0), (2, "b", 0, 1), (3, "b", 1, 1)]
    return assign_ranks(
        [
            facts(slot, node, gpu if gpus else None, bundle=bundle)
            for slot, node, gpu, bundle in found
        ],
        DIMS,
    )


def test_at_first_everybody_is_made_and_gets_what_it_needs_from_ray() -> None:
    staff = assign_slots(plan(), (), (), (), NODES)
    assert staff.posts == dict.fromkeys(range(4))
    assert staff.recruits == tuple(
        WorkerToStart(slot, slot // TP, {"CPU": 1.0, "GPU": 1.0}) for slot in range(4)
    )
    assert num_slots(DIMS) == 6


def test_the_one_that_stands_by_is_told_the_dead_ones_gpu() -> None:
    staff = assign_slots(
        plan(),
        the_map(),
        {0, 2, 3, 4, 5},
        [facts(4, "a", standby=True), facts(5, "b", standby=True)],
        NODES,
    )
    assert staff.promoted == (4,)
    assert staff.recruits == ()
    assert staff.released == ()
    assert staff.posts == {0: Slot(0, 6), 4: Slot(0, 7), 2: Slot(1, 0), 3: Slot(1, 1)}
    reported = [
        facts(0, "a", 6),
        facts(4, "a", standby=True),
        facts(2, "b", 0, bundle=1),
        facts(3, "b", 1, bundle=1),
    ]
    places = assign_ranks(staff.posted(reported), DIMS)
    assert {place.slot: (place.bundle, place.gpu) for place in places} == {
        0: (0, 6),
        4: (0, 7),
        2: (1, 0),
        3: (1, 1),
    }


def test_without_one_on_the_node_a_new_process_is_told_the_gpu() -> None:
    """Ray would give it any GPU that its books call free, and one that stood by may be
    using that.
    """
    staff = assign_slots(
        plan(), the_map(), {0, 1, 3, 4}, [facts(4, "a", standby=True)], NODES
    )
    assert staff.recruits == (WorkerToStart(2, 1, {"CPU": 1.0}),)
    assert staff.promoted == ()
    assert staff.posts[2] == Slot(1, 0)


def test_two_deaths_and_one_that_stands_by() -> None:
    staff = assign_slots(plan(), the_map(), {2, 3, 4}, [facts(4, "a", standby=True)], NODES)
    assert staff.promoted == (4,)
    assert staff.posts[4] == Slot(0, 6)
    assert staff.recruits == (WorkerToStart(0, 0, {"CPU": 1.0}),)
    assert staff.posts[0] == Slot(0, 7)


def test_a_bundle_that_moved_gets_its_gpus_from_ray_again() -> None:
    staff = assign_slots(
        plan(), the_map(), {0, 1, 4}, [facts(4, "a", standby=True)], {0: "a", 1: "c"}
    )
    assert staff.recruits == tuple(
        WorkerToStart(slot, 1, {"CPU": 1.0, "GPU": 1.0}) for slot in (2, 3)
    )
    assert staff.posts == {0: Slot(0, 6), 1: Slot(0, 7), 2: None, 3: None}
    assert staff.released == ()


def test_who_was_half_started_is_used_and_who_fits_nowhere_is_dismissed() -> None:
    half = [facts(0, "a", 6), facts(3, "x", 1, bundle=1)]
    staff = assign_slots(plan(), (), {0, 3, 5}, half, NODES)
    assert staff.posts == dict.fromkeys((0, 1, 2, 4))
    assert [recruit.slot for recruit in staff.recruits] == [1, 2, 4]
    assert staff.released == (3, 5), "one on another node, and one that does not answer"


def test_on_cpu_a_successor_that_did_not_get_to_serve_is_used_again() -> None:
    staff = assign_slots(plan(gpus=False), the_map(gpus=False), {0, 2, 3, 1}, [], NODES)
    assert staff.recruits == ()
    assert set(staff.posts) == {0, 1, 2, 3}
    staff = assign_slots(
        plan(gpus=False), the_map(gpus=False), {0, 2, 3, 4}, [facts(4, "a")], NODES
    )
    assert staff.posts[4] == Slot(0, None)
    assert staff.promoted == ()


def test_one_stands_by_on_each_node() -> None:
    wanted = standbys_wanted(plan(), the_map(), {0, 1, 2, 3}, {})
    assert wanted == [
        WorkerToStart(4, 0, {}, standby=True),
        WorkerToStart(5, 1, {}, standby=True),
    ]
    assert standbys_wanted(plan(), the_map(), {0, 4, 2, 3, 5}, {5: "b"}) == [
        WorkerToStart(1, 0, {}, standby=True)
    ]
    assert standbys_wanted(plan(), the_map(), range(6), {4: "a", 5: "b"}) == []
