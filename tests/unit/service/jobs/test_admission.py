"""Room and queue: pure decisions."""

from hypothesis import given
from hypothesis import strategies as st

from service.jobs.admission import (
    AdmissionDecision,
    AdmittedJob,
    QueuedJob,
    awaited_nodes,
    decide,
)
from service.jobs.capacity import ClusterCapacity, ResourceRequest
from workers.protocol.states import StatusReason
from workers.protocol.wire import NodeGroup, NodeInfo


def node(name: str, cpus: float = 8, gpus: float = 0, **more: object) -> NodeInfo:
    return NodeInfo.model_validate(
        {"node_id": name, "address": name, "cpus": cpus, "gpus": gpus, **more}
    )


def cpu(ranks: int, island: int = 1, cpus: float = 1.0) -> ResourceRequest:
    return ResourceRequest(ranks, island, cpus, gpu=False)


def gpu(ranks: int, island: int = 1, cpus: float = 1.0) -> ResourceRequest:
    return ResourceRequest(ranks, island, cpus, gpu=True)


def test_room_counts_whole_islands_per_node() -> None:
    assert ClusterCapacity([node("a", 3), node("b", 3)]).max_ranks(cpu(1, island=2)) == 4
    assert ClusterCapacity([node("a", 3), node("b", 3)]).max_ranks(cpu(1, island=4)) == 0
    assert ClusterCapacity([node("a", 0.3)]).max_ranks(cpu(1, cpus=0.1)) == 3, (
        "rounding does not eat a rank"
    )
    assert ClusterCapacity([node("a", 8, 4), node("b", 8)]).max_ranks(gpu(1)) == 4
    assert ClusterCapacity([node("a", 2, 4)]).max_ranks(gpu(1)) == 2, (
        "a GPU rank needs its CPUs too"
    )


def test_dead_and_blind_nodes_do_not_count() -> None:
    nodes = [
        node("a", alive=False),
        node("b", storage_ok=False),
        node("c", storage_ok=True),
        node("d", storage_ok=None),
    ]
    assert ClusterCapacity(nodes).max_ranks(cpu(1)) == 16
    assert not ClusterCapacity(nodes[:2]).is_known


def test_big_gaps_stay_big() -> None:
    room = ClusterCapacity([node("a", 8), node("b", 3)])
    assert room.reserve(cpu(3))
    assert room.max_ranks(cpu(1, island=8)) == 8


def test_holding_more_than_is_reported_leaves_nothing() -> None:
    room = ClusterCapacity([node("a", 4)])
    room.reserve_admitted(cpu(9), {})
    assert room.max_ranks(cpu(1)) == 0
    room = ClusterCapacity([node("a", 4), node("b", 4)])
    room.reserve_admitted(cpu(4), {"a": 4})
    assert room.max_ranks(cpu(1, island=4)) == 4


def by_id(decisions: list[AdmissionDecision]) -> dict[str, AdmissionDecision]:
    return {decision.job_id: decision for decision in decisions}


def test_first_come_first_served_within_a_priority() -> None:
    waiting = [
        QueuedJob("late", 0, 3, cpu(1)),
        QueuedJob("early", 0, 1, cpu(1)),
        QueuedJob("urgent", 5, 9, cpu(1)),
    ]
    decisions = decide(waiting, [], [node("a", 2)])
    assert [decision.job_id for decision in decisions] == ["urgent", "early", "late"]
    assert [decision.admit for decision in decisions] == [True, True, False]
    assert decisions[2].reason is StatusReason.WAITING_QUOTA
    assert decisions[2].message == "needs 1 CPU rank; room for 0 now"


def test_small_jobs_do_not_starve_a_large_one() -> None:
    waiting = [QueuedJob("large", 0, 1, cpu(8)), QueuedJob("small", 0, 2, cpu(1))]
    decisions = by_id(decide(waiting, [AdmittedJob("running", cpu(4))], [node("a", 8)]))
    assert not decisions["large"].admit
    assert not decisions["small"].admit
    assert decisions["large"].message == "needs 8 CPU ranks; room for 4 now"
    assert decisions["small"].message == "queued behind large"


def test_what_can_never_fit_holds_back_nobody() -> None:
    waiting = [QueuedJob("giant", 0, 1, cpu(100)), QueuedJob("small", 0, 2, cpu(1))]
    decisions = by_id(decide(waiting, [], [node("a", 8)]))
    assert not decisions["giant"].admit
    assert decisions["small"].admit
    assert "the whole cluster has room for 8" in decisions["giant"].message


def test_a_wait_for_gpus_does_not_hold_back_cpu_jobs() -> None:
    waiting = [QueuedJob("gpu", 0, 1, gpu(2)), QueuedJob("cpu", 0, 2, cpu(2))]
    decisions = by_id(decide(waiting, [AdmittedJob("running", gpu(1))], [node("a", 8, 2)]))
    assert not decisions["gpu"].admit
    assert decisions["cpu"].admit
    assert decisions["cpu"].message == "scheduled: 2 CPU ranks"


needs = st.builds(
    ResourceRequest,
    ranks=st.integers(1, 8),
    island=st.just(1),
    cpus_per_rank=st.sampled_from([0.5, 1.0, 2.0]),
    gpu=st.booleans(),
)
nodes_strategy = st.lists(
    st.tuples(st.integers(0, 8), st.integers(0, 4)), min_size=1, max_size=4
).map(lambda sizes: [node(f"n{i}", cpus, gpus) for i, (cpus, gpus) in enumerate(sizes)])


@given(st.lists(st.tuples(needs, st.integers(-2, 2)), max_size=8), nodes_strategy)
def test_what_is_admitted_fits_and_nobody_is_overtaken(
    jobs: list[tuple[ResourceRequest, int]], nodes: list[NodeInfo]
) -> None:
    waiting = [
        QueuedJob(f"j{i}", priority, i, need) for i, (need, priority) in enumerate(jobs)
    ]
    decisions = decide(waiting, [], nodes)
    request_of = {job.job_id: job.request for job in waiting}
    admitted = [request_of[decision.job_id] for decision in decisions if decision.admit]
    assert (
        sum(need.ranks * need.cpus_per_rank for need in admitted)
        <= sum(item.cpus for item in nodes) + 1e-6
    )
    assert sum(need.ranks for need in admitted if need.gpu) <= sum(
        item.gpus for item in nodes
    )
    assert len(decisions) == len(waiting)
    for kind in (True, False):
        order = [
            decision
            for decision in decisions
            if request_of[decision.job_id].gpu is kind
            and "whole cluster" not in decision.message
        ]
        assert [decision.admit for decision in order] == sorted(
            (decision.admit for decision in order), reverse=True
        )


def test_a_wait_names_the_ranks_that_must_share_a_node() -> None:
    waiting = [
        QueuedJob("wide", 0, 1, gpu(8, island=4)),
        QueuedJob("wider", 5, 2, gpu(8, 8)),
    ]
    decisions = by_id(decide(waiting, [], [node("a", 8, 4), node("b", 8, 4)]))
    assert decisions["wide"].message == "scheduled: 8 GPU ranks"
    assert decisions["wider"].message == (
        "needs 8 GPU ranks in groups of 8 on one node; the whole cluster has room for 0"
    )


# ---- clusters that may grow

HEAD = node("head", cpus=0)
GPU_8 = NodeGroup(name="gpu-8", max_nodes=2, cpus=32, gpus=8)


def test_a_job_is_admitted_for_nodes_that_are_not_there_yet() -> None:
    waiting = [QueuedJob("job", 0, 1, gpu(16, island=8))]
    assert not decide(waiting, [], [HEAD])[0].admit
    (decision,) = decide(waiting, [], [HEAD], [GPU_8])
    assert decision.admit
    assert decision.message == "scheduled: 16 GPU ranks, on 2 new nodes of gpu-8"


def test_nodes_that_are_there_are_used_first() -> None:
    present = node("a", 32, 8, labels={"ray.io/node-group": "gpu-8"})
    waiting = [QueuedJob("first", 0, 1, gpu(8)), QueuedJob("second", 0, 2, gpu(8))]
    decisions = by_id(decide(waiting, [], [HEAD, present], [GPU_8]))
    assert decisions["first"].message == "scheduled: 8 GPU ranks"
    assert decisions["second"].message == "scheduled: 8 GPU ranks, on 1 new node of gpu-8"


def test_no_two_jobs_are_admitted_for_the_same_new_node() -> None:
    waiting = [QueuedJob(name, 0, i, gpu(8)) for i, name in enumerate("abc")]
    decisions = by_id(decide(waiting, [], [HEAD], [GPU_8]))
    assert [decisions[name].admit for name in "abc"] == [True, True, False]
    # They wait for their nodes; a third one would exceed the bound.
    admitted = [AdmittedJob(name, gpu(8)) for name in "ab"]
    (decision,) = decide(waiting[2:], admitted, [HEAD], [GPU_8])
    assert decision.message == "needs 8 GPU ranks; room for 0 now"


def test_what_exceeds_the_bound_holds_back_nobody() -> None:
    waiting = [QueuedJob("giant", 0, 1, gpu(24)), QueuedJob("small", 0, 2, gpu(1))]
    decisions = by_id(decide(waiting, [], [HEAD], [GPU_8]))
    assert decisions["giant"].message == (
        "needs 24 GPU ranks; the whole cluster has room for 16"
    )
    assert decisions["small"].admit


def test_after_nodes_did_not_come_other_jobs_go_first() -> None:
    present = node("a", 32, 8, labels={"ray.io/node-group": "gpu-8"})
    waiting = [
        QueuedJob("large", 5, 1, gpu(16), retry_s=42.4),
        QueuedJob("small", 0, 2, gpu(8)),
    ]
    decisions = by_id(decide(waiting, [], [HEAD, present], [GPU_8]))
    assert decisions["large"].reason is StatusReason.WAITING_NODES
    assert decisions["large"].message == (
        "needs 16 GPU ranks, and new nodes did not come in time; they are requested again "
        "in 42 s, until then other jobs go first"
    )
    assert decisions["small"].message == "scheduled: 8 GPU ranks"
    # When they have come all the same, it runs.
    more = [present, node("b", 32, 8, labels={"ray.io/node-group": "gpu-8"})]
    assert by_id(decide(waiting, [], more, [GPU_8]))["large"].admit


def test_an_admitted_job_waits_for_what_is_still_missing() -> None:
    job = AdmittedJob("job", gpu(16, island=8))
    assert awaited_nodes([job], [HEAD], [GPU_8]) == {"job": {"gpu-8": 2}}
    present = [
        node(name, 32, 8, labels={"ray.io/node-group": "gpu-8"}) for name in ("a", "b")
    ]
    assert awaited_nodes([job], [HEAD, present[0]], [GPU_8]) == {"job": {"gpu-8": 1}}
    assert awaited_nodes([job], [HEAD, *present], [GPU_8]) == {"job": {}}
    # One that has its ranks waits for nothing, and what it uses is not free for others.
    placed = AdmittedJob("placed", gpu(8), {"a": 8})
    assert awaited_nodes([job, placed], [HEAD, *present], [GPU_8]) == {}
    assert awaited_nodes(
        [job, placed], [HEAD, *present], [GPU_8.model_copy(update={"max_nodes": 3})]
    ) == {"job": {"gpu-8": 1}}


def test_as_few_new_nodes_as_possible_the_last_one_not_too_large() -> None:
    small = NodeGroup(name="gpu-1", max_nodes=4, cpus=4, gpus=1)
    capacity = ClusterCapacity([HEAD], [small, GPU_8])
    assert capacity.new_nodes(gpu(1)) == {"gpu-1": 1}
    assert capacity.new_nodes(gpu(8)) == {"gpu-8": 1}
    assert capacity.new_nodes(gpu(9)) == {"gpu-8": 1, "gpu-1": 1}
    assert capacity.new_nodes(gpu(20)) == {"gpu-8": 2, "gpu-1": 4}
    assert capacity.max_ranks(gpu(1)) == 20
    assert capacity.max_ranks(gpu(1), may_grow=False) == 0


@given(
    st.lists(st.tuples(needs, st.integers(-2, 2)), max_size=8),
    nodes_strategy,
    st.lists(
        st.tuples(st.integers(1, 8), st.integers(0, 4), st.integers(0, 3)), max_size=2
    ),
)
def test_all_that_is_admitted_fits_below_the_bound(
    jobs: list[tuple[ResourceRequest, int]],
    nodes: list[NodeInfo],
    sizes: list[tuple[int, int, int]],
) -> None:
    groups = [
        NodeGroup(name=f"g{i}", max_nodes=most, cpus=cpus, gpus=gpus)
        for i, (cpus, gpus, most) in enumerate(sizes)
    ]
    waiting = [
        QueuedJob(f"j{i}", priority, i, request)
        for i, (request, priority) in enumerate(jobs)
    ]
    grown = ClusterCapacity(nodes, groups)
    requests = {job.job_id: job.request for job in waiting}
    for decision in decide(waiting, [], nodes, groups):
        if decision.admit:
            new = grown.new_nodes(requests[decision.job_id])
            assert all(
                new[group.name] <= group.max_nodes for group in groups if group.name in new
            )
            assert grown.reserve(requests[decision.job_id])
