"""Room and queue: pure decisions."""

from hypothesis import given
from hypothesis import strategies as st

from service.jobs.admission import AdmissionDecision, AdmittedJob, QueuedJob, decide
from service.jobs.capacity import ClusterCapacity, ResourceRequest
from workers.protocol.states import StatusReason
from workers.protocol.wire import NodeInfo


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
    assert decisions[2].message == "needs 1 CPU ranks; room for 0 now"


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
