"""Bundles before placement, the rank map after it, and the words when neither works."""

import random
import time

import pytest

from megatron_ray.parallel_dims import ParallelDims
from workers.decisions.placement import (
    PlacementError,
    SlotFacts,
    assign_ranks,
    islands_that_fit,
    plan_placement,
)
from workers.protocol.job import JobSpec
from workers.protocol.wire import NodeInfo


def spec(tp: int, dp: int, **resources: object) -> JobSpec:
    return JobSpec.from_mapping(
        {
            "model": {"preset": "gpt-tiny"},
            "parallel": {"tp": tp, "dp": dp},
            "data": {"train": [{"path": "x"}]},
            "training": {"seq_length": 8, "global_batch_size": 8, "steps": 1},
            "optimizer": {"lr": 0.1},
            "resources": resources,
        }
    )


def node(name: str, cpus: float = 8, gpus: float = 0, **extra: object) -> NodeInfo:
    return NodeInfo(node_id=name, address=f"10.0.0.{name}", cpus=cpus, gpus=gpus, **extra)


def test_a_bundle_is_a_tensor_parallel_group() -> None:
    plan = plan_placement(spec(4, 2), [node("1", gpus=8, cpus=64)])
    assert plan.accelerator == "gpu"
    assert [bundle.slots for bundle in plan.bundles] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert plan.bundles[0].resources == {"CPU": 4.0, "GPU": 4.0}
    assert plan.worker_resources == {"CPU": 1.0, "GPU": 1.0}
    assert plan.capacity == 2
    assert plan.is_feasible


def test_an_island_never_straddles_nodes() -> None:
    plan = plan_placement(
        spec(2, 3), [node("1", gpus=3, cpus=9), node("2", gpus=3, cpus=9)]
    )
    assert plan.capacity == 2, "six GPUs, but only one pair a node"
    assert not plan.is_feasible
    assert plan.explanation == (
        "asked for 3 x 2 CPU + 2 GPU, each on one node; the cluster could hold 2: "
        "node 10.0.0.1 has 9 CPU + 3 GPU: room for 1; node 10.0.0.2 has 9 CPU + 3 GPU: room for 1"
    )


def test_cpu_limits_gpu_jobs_too() -> None:
    plan = plan_placement(spec(2, 1, cpus_per_rank=8), [node("1", gpus=8, cpus=20)])
    assert plan.capacity == 1


def test_a_fraction_of_a_cpu_fits_as_often_as_it_should() -> None:
    assert islands_that_fit({"CPU": 0.3}, {"CPU": 0.1}, 1) == 3
    assert islands_that_fit({"CPU": 0.8}, {"CPU": 0.1}, 2) == 4
    assert islands_that_fit({"CPU": -1.0}, {"CPU": 0.1}, 1) == 0
    assert islands_that_fit({"CPU": 8.0}, {"CPU": 1.0, "GPU": 1.0}, 1) == 0


def test_gpus_of_a_node_that_does_not_see_the_storage_do_not_count() -> None:
    nodes = [node("1", gpus=8, storage_ok=False), node("2")]
    assert plan_placement(spec(1, 1), nodes).accelerator == "cpu"


def test_accelerator_is_decided_once() -> None:
    assert plan_placement(spec(1, 1), [node("1")]).accelerator == "cpu"
    assert plan_placement(spec(1, 1), [node("1")], accelerator="gpu").capacity == 0
    assert (
        plan_placement(spec(1, 1, accelerator="cpu"), [node("1", gpus=8)]).accelerator
        == "cpu"
    )


def test_nodes_that_do_not_see_the_storage_are_refused_by_name() -> None:
    plan = plan_placement(spec(1, 1), [node("1", storage_ok=False), node("2", alive=False)])
    assert plan.avoid_nodes == ("1",)
    assert plan.explanation.endswith(
        "the cluster could hold 0: node 10.0.0.1 is excluded: it cannot read the job storage"
    )
    assert plan_placement(spec(1, 1), []).explanation.endswith("it has no nodes")


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
