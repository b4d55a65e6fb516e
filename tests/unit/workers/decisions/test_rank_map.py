"""The rank map: which rank is where, from what the workers report."""

import random
import time

import pytest

from megatron_ray.parallel_dims import ParallelDims
from workers.decisions.placement import PlacementError, SlotFacts
from workers.decisions.rank_map import assign_ranks


def facts(
    slot: int, bundle: int, node_name: str, gpu: int | None = None, **extra: object
) -> SlotFacts:
    fields = {
        "slot": slot,
        "bundle": bundle,
        "node_id": f"id-{node_name}",
        "address": f"10.0.0.{node_name}",
        "pid": 1000 + slot,
        "gpu": gpu,
    }
    return SlotFacts.model_validate({**fields, **extra})


def test_ranks_follow_nodes_and_gpus_not_bundle_numbers() -> None:
    # Ray put bundle 0 alone on the second node.
    slots = [
        facts(0, 0, "10", 1),
        facts(1, 0, "10", 0),
        facts(2, 1, "9", 3),
        facts(3, 1, "9", 2),
        facts(4, 2, "9", 0),
        facts(5, 2, "9", 1),
    ]
    places = assign_ranks(slots, ParallelDims(tp=2, dp=3))
    assert [place.slot for place in places] == [4, 5, 3, 2, 1, 0]
    assert [place.local_rank for place in places] == [0, 1, 2, 3, 0, 1]
    assert [place.node_rank for place in places] == [0, 0, 0, 0, 1, 1]
    assert [place.local_world_size for place in places] == [4, 4, 4, 4, 2, 2]
    assert places[3].coordinates == {"tp": 1, "cp": 0, "dp": 1, "pp": 0}


def test_addresses_are_sorted_by_number() -> None:
    addresses = ["fd00::10", "fd00::9", "10.0.0.9", "::1", "127.0.0.2", "10.0.0.10"]
    slots = []
    for slot, address in enumerate(addresses):
        slots.append(facts(slot, slot, str(slot), address=address))
    places = assign_ranks(slots, ParallelDims(dp=6))
    assert [place.address for place in places] == [
        "10.0.0.9",
        "10.0.0.10",
        "127.0.0.2",
        "::1",
        "fd00::9",
        "fd00::10",
    ]


def islands_on(*counts: int) -> list[SlotFacts]:
    """Returns single-GPU islands, so many of them on each node."""
    slots = list[SlotFacts]()
    for name, count in enumerate(counts, start=1):
        for gpu in range(count):
            slot = len(slots)
            slots.append(facts(slot, slot, str(name), gpu))
    return slots


def test_near_ranks_share_a_node_where_they_can() -> None:
    # By address alone, the second and the third pair would each be on two nodes.
    places = assign_ranks(islands_on(3, 2, 3), ParallelDims(cp=2, dp=4))
    pairs = [
        {place.node_id for place in places[first : first + 2]} for first in (0, 2, 4, 6)
    ]
    assert pairs == [{"id-1"}, {"id-1", "id-3"}, {"id-2"}, {"id-3"}]


def test_ranks_of_one_expert_group_share_a_node_before_pipeline_stages_do() -> None:
    places = assign_ranks(islands_on(4, 4), ParallelDims(dp=4, pp=2, ep=4))
    assert [place.node_id for place in places] == ["id-1"] * 4 + ["id-2"] * 4
    assert [place.coordinates["pp"] for place in places] == [0] * 4 + [1] * 4


def test_devices_keep_their_ranks_when_others_are_replaced() -> None:
    dims = ParallelDims(dp=4)
    before = assign_ranks(islands_on(2, 2), dims)
    # Node 1 is lost, and its bundles come back on a node that would be sorted last.
    moved = [facts(0, 0, "7", 0), facts(1, 1, "7", 1), *islands_on(2, 2)[2:]]
    after = assign_ranks(moved, dims, before)
    assert [place.node_id for place in after] == ["id-7", "id-7", "id-2", "id-2"]
    assert after[2:] == tuple(
        place.model_copy(update={"node_rank": 1}) for place in before[2:]
    )
    # Without a map of before, they are sorted.
    assert assign_ranks(moved, dims)[0].node_id == "id-2"


def test_a_process_that_replaces_another_on_cpu_takes_its_rank() -> None:
    dims = ParallelDims(tp=2, dp=2)
    slots = [facts(slot, slot // 2, "1") for slot in range(4)]
    before = assign_ranks(slots, dims)
    # Slot 4 replaces slot 0 in bundle 0.
    after = assign_ranks([facts(4, 0, "1"), *slots[1:]], dims, before)
    assert [place.slot for place in after] == [4, 1, 2, 3]


def test_ranks_that_stay_do_not_move_near_ranks_apart() -> None:
    dims = ParallelDims(cp=2, dp=2)
    before = assign_ranks(islands_on(2, 2), dims)
    # One island of each pair has moved to node 3: the survivors' ranks would split both.
    slots = [
        facts(0, 0, "1", 0),
        facts(1, 1, "3", 0),
        facts(2, 2, "1", 1),
        facts(3, 3, "3", 1),
    ]
    after = assign_ranks(slots, dims, before)
    assert [place.node_id for place in after] == ["id-1", "id-1", "id-3", "id-3"]


def part(slot: int, bundle: int, node_name: str, domain: str) -> SlotFacts:
    return facts(slot, bundle, node_name, slot % 2, domain=domain)


def test_parts_of_an_island_are_joined_within_their_domain() -> None:
    dims = ParallelDims(tp=4, dp=2)
    slots = []
    for bundle, (name, domain) in enumerate(
        [("4", "y"), ("1", "x"), ("3", "y"), ("2", "x")]
    ):
        slots += [part(2 * bundle, bundle, name, domain)]
        slots += [part(2 * bundle + 1, bundle, name, domain)]
    places = assign_ranks(slots, dims, size=2)
    assert [place.node_id[-1] for place in places] == list("11223344")
    message = "1 bundles lie in NVLink domain none, a tensor-parallel group needs 2"
    slots = [
        part(0, 0, "1", ""),
        part(1, 0, "1", ""),
        part(2, 1, "2", "x"),
        part(3, 1, "2", "x"),
    ]
    with pytest.raises(PlacementError, match=message):
        assign_ranks(slots, ParallelDims(tp=4), size=2)


def test_domains_come_first() -> None:
    slots = [facts(0, 0, "1", 0, domain="b"), facts(1, 1, "2", 0, domain="a")]
    assert [place.slot for place in assign_ranks(slots, ParallelDims(dp=2))] == [1, 0]


def test_an_island_on_two_nodes_is_refused() -> None:
    with pytest.raises(
        PlacementError, match=r"bundle 0 lies on several nodes: 10.0.0.1, 10.0.0.2"
    ):
        assign_ranks([facts(0, 0, "1"), facts(1, 0, "2")], ParallelDims(tp=2))


def test_a_wrong_number_of_workers_is_refused() -> None:
    with pytest.raises(PlacementError, match="1 workers reported for a world of 2 ranks"):
        assign_ranks([facts(0, 0, "1")], ParallelDims(tp=2))
    with pytest.raises(PlacementError, match="2 workers reported for a world of 2"):
        assign_ranks([facts(0, 0, "1"), facts(0, 1, "1")], ParallelDims(dp=2))
    with pytest.raises(
        PlacementError, match="bundle 0 has 3 workers, a tensor-parallel group needs 2"
    ):
        assign_ranks(
            [facts(slot, int(slot == 3), "1") for slot in range(4)],
            ParallelDims(tp=2, dp=2),
        )


def test_one_gpu_for_two_workers_is_refused() -> None:
    with pytest.raises(
        PlacementError, match=r"several workers report GPU 0 on node 10.0.0.1"
    ):
        assign_ranks([facts(0, 0, "1", 0), facts(1, 0, "1", 0)], ParallelDims(tp=2))


def test_thousands_of_ranks() -> None:
    tp = 8
    dp = 64
    pp = 8
    dims = ParallelDims(tp=tp, dp=dp, pp=pp)
    order = list(range(dims.world_size // tp))
    random.Random(0).shuffle(order)
    slots = [
        facts(bundle * tp + gpu, bundle, f"{island:04d}", gpu)
        for bundle, island in enumerate(order)
        for gpu in range(tp)
    ]
    random.Random(1).shuffle(slots)
    started = time.perf_counter()
    places = assign_ranks(slots, dims)
    assert time.perf_counter() - started < 10
    assert [place.rank for place in places] == list(range(4096))
    for group in range(0, 4096, tp):
        assert len({place.node_id for place in places[group : group + tp]}) == 1
        assert [place.gpu for place in places[group : group + tp]] == list(range(tp))
    assert places == assign_ranks(sorted(slots, key=lambda item: item.slot), dims), (
        "a pure function of the places"
    )
