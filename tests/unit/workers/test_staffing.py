"""Who serves, who steps in, who is made anew: on one node and on several, with GPUs and without."""

from megatron_ray.parallel_dims import ParallelDims
from workers.decisions.placement import Bundle, PlacementPlan, RankPlace, SlotFacts, assign_ranks
from workers.decisions.slot_assignment import Post, Recruit, fill_posts, num_slots, standbys_wanted

TP = 2
DP = 2
"""Slots 0 and 1 in bundle 0 on node a, 2 and 3 in bundle 1 on node b, 4 and 5 for those that stand
by."""
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
    staff = fill_posts(plan(), (), (), (), NODES)
    assert staff.posts == dict.fromkeys(range(4))
    assert staff.recruits == tuple(
        Recruit(slot, slot // TP, {"CPU": 1.0, "GPU": 1.0}) for slot in range(4)
    )
    assert num_slots(DIMS) == 6


def test_the_one_that_stands_by_is_told_the_dead_ones_gpu() -> None:
    staff = fill_posts(
        plan(),
        the_map(),
        {0, 2, 3, 4, 5},
        [facts(4, "a", standby=True), facts(5, "b", standby=True)],
        NODES,
    )
    assert staff.stepped_in == (4,) and staff.recruits == () and staff.dismissed == ()
    assert staff.posts == {0: Post(0, 6), 4: Post(0, 7), 2: Post(1, 0), 3: Post(1, 1)}
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
    """Ray would give it any GPU that its books call free, and one that stood by may be using that."""
    staff = fill_posts(plan(), the_map(), {0, 1, 3, 4}, [facts(4, "a", standby=True)], NODES)
    assert staff.recruits == (Recruit(2, 1, {"CPU": 1.0}),) and staff.stepped_in == ()
    assert staff.posts[2] == Post(1, 0)


def test_two_deaths_and_one_that_stands_by() -> None:
    staff = fill_posts(plan(), the_map(), {2, 3, 4}, [facts(4, "a", standby=True)], NODES)
    assert staff.stepped_in == (4,) and staff.posts[4] == Post(0, 6)
    assert staff.recruits == (Recruit(0, 0, {"CPU": 1.0}),) and staff.posts[0] == Post(0, 7)


def test_a_bundle_that_moved_gets_its_gpus_from_ray_again() -> None:
    staff = fill_posts(
        plan(), the_map(), {0, 1, 4}, [facts(4, "a", standby=True)], {0: "a", 1: "c"}
    )
    assert staff.recruits == tuple(Recruit(slot, 1, {"CPU": 1.0, "GPU": 1.0}) for slot in (2, 3))
    assert staff.posts == {0: Post(0, 6), 1: Post(0, 7), 2: None, 3: None} and staff.dismissed == ()


def test_who_was_half_started_is_used_and_who_fits_nowhere_is_dismissed() -> None:
    half = [facts(0, "a", 6), facts(3, "x", 1, bundle=1)]
    staff = fill_posts(plan(), (), {0, 3, 5}, half, NODES)
    assert staff.posts == dict.fromkeys((0, 1, 2, 4)) and [
        recruit.slot for recruit in staff.recruits
    ] == [1, 2, 4]
    assert staff.dismissed == (3, 5), "one on another node, and one that does not answer"


def test_on_cpu_a_successor_that_did_not_get_to_serve_is_used_again() -> None:
    staff = fill_posts(plan(gpus=False), the_map(gpus=False), {0, 2, 3, 1}, [], NODES)
    assert staff.recruits == () and set(staff.posts) == {0, 1, 2, 3}
    staff = fill_posts(plan(gpus=False), the_map(gpus=False), {0, 2, 3, 4}, [facts(4, "a")], NODES)
    assert staff.posts[4] == Post(0, None) and staff.stepped_in == ()


def test_one_stands_by_on_each_node() -> None:
    wanted = standbys_wanted(plan(), the_map(), {0, 1, 2, 3}, {})
    assert wanted == [Recruit(4, 0, {}, standby=True), Recruit(5, 1, {}, standby=True)]
    assert standbys_wanted(plan(), the_map(), {0, 4, 2, 3, 5}, {5: "b"}) == [
        Recruit(1, 0, {}, standby=True)
    ]
    assert standbys_wanted(plan(), the_map(), range(6), {4: "a", 5: "b"}) == []
