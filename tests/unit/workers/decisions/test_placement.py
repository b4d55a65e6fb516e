"""Bundles before placement, and the words when they fit nowhere."""

import cProfile
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.ray_scheduler import RayScheduler, meets
from workers.decisions.placement import plan_placement
from workers.decisions.rank_map import assign_ranks
from workers.decisions.topology.node_rules import NodeRules
from workers.decisions.topology.room import islands_that_fit
from workers.protocol.job import JobSpec
from workers.protocol.wire import NodeInfo


def spec(
    tp: int,
    dp: int,
    parallel: dict[str, int] | None = None,
    model: dict[str, object] | None = None,
    **resources: object,
) -> JobSpec:
    return JobSpec.from_mapping(
        {
            "model": model or {"preset": "gpt-tiny"},
            "parallel": {"tp": tp, "dp": dp, **(parallel or {})},
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
        "node 10.0.0.1 has 9 CPU + 3 GPU: room for 1; node 10.0.0.2 has 9 CPU + 3 GPU: room for 1; "
        "dp=2 would fit"
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


# ---- any cluster


@st.composite
def clusters(draw: st.DrawFn) -> list[NodeInfo]:
    """Up to 12 nodes of several kinds, partly in use."""
    nodes = []
    for index in range(draw(st.integers(0, 12))):
        gpus = draw(st.sampled_from([0, 2, 4, 8]))
        gpu_type = None
        resources = {"rdma": float(draw(st.integers(0, 8)))}
        if gpus:
            gpu_type = draw(st.sampled_from(["H100", "A100"]))
            resources[f"accelerator_type:{gpu_type}"] = 1.0
        labels = {"pool": draw(st.sampled_from(["a", "b", "c"]))}
        if draw(st.booleans()):
            labels["ray.io/gpu-domain"] = draw(st.sampled_from(["d0", "d1"]))
        total = {"CPU": 16.0, "GPU": float(gpus), **resources}
        used = draw(st.integers(0, gpus))
        nodes.append(
            NodeInfo(
                node_id=f"n{index}",
                address=f"10.0.0.{index}",
                alive=draw(st.integers(0, 9)) > 0,
                cpus=16,
                gpus=gpus,
                accelerator_type=gpu_type,
                resources=resources,
                labels=labels,
                storage_ok=draw(st.sampled_from([None, True, True, False])),
                free={**total, "GPU": float(gpus - used)},
            )
        )
    return nodes


PATTERNS = st.sampled_from(["pool=a", "pool=b", "10.0.0.1", "10.0.0.2", "n3", "other=x"])


@st.composite
def specs(draw: st.DrawFn) -> JobSpec:
    tp, cp, pp, dp = draw(
        st.sampled_from(
            [
                (1, 1, 1, 4),
                (2, 1, 2, 2),
                (2, 2, 1, 2),
                (4, 2, 1, 1),
                (8, 1, 1, 2),
                (16, 1, 1, 1),
            ]
        )
    )
    resources: dict[str, Any] = {
        "accelerator": draw(st.sampled_from(["auto", "gpu"])),
        "gpu_type": draw(st.sampled_from([None, None, "h100", "A100", "B200"])),
        "custom": draw(st.sampled_from([{}, {}, {"rdma": 1}])),
        "nodes": {
            "only": draw(st.lists(PATTERNS, max_size=3)),
            "exclude": draw(st.lists(PATTERNS, max_size=2)),
        },
    }
    return spec(tp, dp, parallel={"cp": cp, "pp": pp}, **resources)


@settings(max_examples=200, deadline=None, database=None)
@given(
    clusters(), specs(), st.dictionaries(st.sampled_from(["n0", "n4"]), st.just("noisy"))
)
def test_ray_can_only_do_what_the_plan_allows(
    nodes: list[NodeInfo], asked: JobSpec, avoid: dict[str, str]
) -> None:
    rules = NodeRules.of(asked, avoid)
    plan = plan_placement(asked, nodes, avoid=avoid)
    allowed = {node.node_id for node in nodes if rules.allows(node)}
    assert set(plan.allowed_nodes) == allowed
    living = {node.node_id for node in nodes if node.alive}
    assert set(plan.avoid_nodes) == living - allowed
    # Every node that Ray may choose is allowed, and every allowed one may be chosen.
    (first, *_) = plan.bundles
    for node in nodes:
        has_type = True
        for name in first.resources:
            if name.startswith("accelerator_type:"):
                has_type = name in node.resources
        if (
            node.alive
            and plan.domain_label is None
            and "ray.io/gpu-domain" not in first.selector
        ):
            may_choose = meets(node, first.selector) and has_type
            assert may_choose == (node.node_id in allowed), (node, first)
    facts = RayScheduler(nodes, seed=len(nodes)).place(plan)
    if facts is None:
        return
    assert plan.is_feasible
    assert {item.node_id for item in facts} <= allowed
    places = assign_ranks(facts, plan.dims, size=plan.bundle_size)
    assert sorted(place.slot for place in places) == list(range(plan.dims.world_size))
    # On one node, or in one NVLink domain where no node is large enough.
    for group in plan.dims.groups(["tp"]):
        group_nodes = {places[rank].node_id for rank in group}
        assert len(group_nodes) == 1 or plan.bundle_size < plan.dims.tp
    if plan.bundle_size > plan.dims.tp:
        for first_rank in range(0, plan.dims.world_size, plan.bundle_size):
            block = places[first_rank : first_rank + plan.bundle_size]
            assert len({place.node_id for place in block}) == 1, "near ranks share a node"


@settings(max_examples=50, deadline=None, database=None)
@given(clusters(), specs(), specs(), st.integers(0, 99))
def test_two_jobs_that_do_not_fit_together_run_one_after_the_other(
    nodes: list[NodeInfo], first: JobSpec, second: JobSpec, seed: int
) -> None:
    nodes = [node.model_copy(update={"free": None}) for node in nodes]
    plans = [plan_placement(asked, nodes) for asked in (first, second)]
    both = RayScheduler(nodes, seed)
    placed = [both.place(plan) is not None for plan in plans]
    # Nothing is held by a job that waits: alone, each that is feasible gets its place.
    for plan, is_placed in zip(plans, placed, strict=True):
        if plan.is_feasible and not is_placed:
            alone = RayScheduler(nodes, seed)
            assert alone.place(plan) is not None
    assert placed[0] == plans[0].is_feasible


# ---- near ranks


def full(
    name: str, gpus: float, free_gpus: float | None = None, **extra: object
) -> NodeInfo:
    free = {"CPU": 64.0, "GPU": gpus if free_gpus is None else free_gpus}
    return node(name, cpus=64, gpus=gpus, free=free, **extra)


def test_ranks_that_share_a_sequence_get_one_bundle_where_it_is_free_now() -> None:
    asked = spec(2, 1, parallel={"cp": 2, "pp": 2})
    assert plan_placement(asked, [full("1", 4), full("2", 4)]).bundle_size == 4
    # Nearness never delays a job: three free GPUs a node hold single pairs.
    assert plan_placement(asked, [full("1", 4, 3), full("2", 4, 3)]).bundle_size == 2
    # Not even those are free now, so Ray gets the choice of nodes.
    assert plan_placement(asked, [full("1", 4, 1), full("2", 4, 1)]).bundle_size == 2
    # What is in use is unknown.
    assert plan_placement(asked, [node("1", gpus=8, cpus=64)]).bundle_size == 2
    # The bundles of an existing placement group stay as they are.
    assert plan_placement(asked, [full("1", 4), full("2", 4)], size=2).bundle_size == 2


def test_ranks_that_share_experts_get_one_bundle() -> None:
    moe = {"num_experts": 8}
    asked = spec(1, 8, parallel={"ep": 4}, model={"preset": "gpt-tiny", "moe": moe})
    plan = plan_placement(asked, [full("1", 8), full("2", 8)])
    assert [bundle.slots for bundle in plan.bundles] == [(0, 1, 2, 3), (4, 5, 6, 7)]


# ---- NVLink domains


def rack(name: str, domain: str) -> NodeInfo:
    return full(name, 4, labels={"ray.io/gpu-domain": domain})


def test_an_island_larger_than_a_node_lies_in_one_nvlink_domain() -> None:
    nodes = [rack("1", "x"), rack("2", "x"), rack("3", "y"), rack("4", "y")]
    plan = plan_placement(spec(8, 1), nodes)
    assert (plan.bundle_size, plan.domain_label) == (4, "ray.io/gpu-domain")
    assert plan.is_feasible
    # Two of them do not fit into either domain, so each bundle names its own.
    plan = plan_placement(spec(8, 2), nodes)
    domains = [bundle.selector["ray.io/gpu-domain"] for bundle in plan.bundles]
    assert (domains, plan.domain_label) == (["x", "x", "y", "y"], None)
    facts = RayScheduler(nodes, 0).place(plan)
    assert facts is not None
    places = assign_ranks(facts, plan.dims, size=plan.bundle_size)
    assert [place.address[-1] for place in places[::4]] == ["1", "2", "3", "4"]


def test_an_island_larger_than_a_node_is_refused_without_a_domain() -> None:
    nodes = [full("1", 4), full("2", 4)]
    plan = plan_placement(spec(8, 1), nodes)
    assert not plan.is_feasible
    assert plan.explanation == (
        "asked for 1 x 8 CPU + 8 GPU, each on one node; the cluster could hold 0: "
        "node 10.0.0.1 has 64 CPU + 4 GPU: room for 0; node 10.0.0.2 has 64 CPU + 4 GPU: "
        "room for 0; tp=4, dp=2 would fit"
    )


def _calls_of_a_plan(num_nodes: int) -> int:
    """Returns how many functions are called by the plan of a job that fills its nodes."""
    nodes = []
    for index in range(num_nodes):
        address = f"10.0.{index // 256}.{index % 256}"
        fields = node("1", cpus=64, gpus=8).model_dump() | {
            "node_id": f"n{index}",
            "address": address,
            "free": {"CPU": 64.0, "GPU": 8.0},
        }
        nodes.append(NodeInfo.model_validate(fields))
    dp = num_nodes // 8
    asked = spec(4, dp, parallel={"cp": 2, "pp": 8}, nodes={"exclude": ["10.9.9.9"]})
    profile = cProfile.Profile()
    with profile:
        plan = plan_placement(asked, nodes)
    assert (len(plan.bundles), plan.bundle_size) == (num_nodes, 8)
    return sum(entry.callcount for entry in profile.getstats())


def test_the_work_of_a_plan_grows_with_the_nodes_up_to_16384_ranks() -> None:
    calls = _calls_of_a_plan(2048)
    # Counted, not timed: 0.2 s on an idle core, of which a busy one makes anything.
    assert calls / 2048 < 400
    assert calls <= 8.5 * _calls_of_a_plan(256)
