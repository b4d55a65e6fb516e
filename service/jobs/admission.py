"""Decides which queued jobs may request resources from Ray.

Owns: the queue's rule. Pure. Must not know: the database, HTTP, Ray.

Jobs are ordered by priority, then by time of queueing. A waiting job blocks later jobs
that need the same kind of rank (with or without GPU), so small jobs never starve a
large one. A job that exceeds the empty cluster blocks no other job.

Nodes that an autoscaler may still give to the cluster count like others, after those
that are there: a job that needs them is admitted, and what it requests of Ray makes the
autoscaler start them. Each of them is reserved once, so all jobs together never request
more than the cluster's bound.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from service.jobs.capacity import ClusterCapacity, ResourceRequest
from workers.decisions.cluster_growth import describe_nodes
from workers.protocol.states import StatusReason
from workers.protocol.wire import NodeGroup, NodeInfo
from workers.protocol.wording import counted


@dataclass(frozen=True)
class QueuedJob:
    """A job in the queue."""

    job_id: str
    priority: int
    queue_number: int
    """Smaller was queued earlier."""
    request: ResourceRequest
    retry_s: float | None = None
    """Seconds until new nodes may be requested for it, because the last ones did not
    come; None: they may be requested now."""


@dataclass(frozen=True)
class AdmittedJob:
    """A job that was admitted before and has not ended."""

    job_id: str
    request: ResourceRequest
    ranks_by_node: Mapping[str, int] = field(default_factory=dict)
    """Number of ranks by node id; empty while it is unknown where they are."""


@dataclass(frozen=True)
class AdmissionDecision:
    """The decision about one queued job."""

    job_id: str
    admit: bool
    reason: StatusReason | None
    message: str


def decide(
    queued: Iterable[QueuedJob],
    admitted: Iterable[AdmittedJob],
    nodes: Sequence[NodeInfo],
    groups: Sequence[NodeGroup] = (),
) -> list[AdmissionDecision]:
    """Returns one decision per queued job, in the order of the queue."""
    # Resources that admitted jobs leave free.
    free = ClusterCapacity(nodes, groups)
    for job in _located_first(admitted):
        free.reserve_admitted(job.request, job.ranks_by_node)
    empty = ClusterCapacity(nodes, groups)
    # The first waiting job by kind of rank (with or without GPU).
    blocked_by: dict[bool, str] = {}
    decisions = []
    for candidate in sorted(queued, key=lambda job: (-job.priority, job.queue_number)):
        decisions.append(_decide_one(candidate, free, empty, blocked_by))
    return decisions


def awaited_nodes(
    admitted: Iterable[AdmittedJob], nodes: Sequence[NodeInfo], groups: Sequence[NodeGroup]
) -> dict[str, dict[str, int]]:
    """Returns by job how many nodes of each group admitted jobs wait for."""
    free = ClusterCapacity(nodes, groups)
    awaited = {}
    for job in _located_first(admitted):
        # Its nodes may have gone, and more than the bound is never requested.
        if not job.ranks_by_node and free.max_ranks(job.request) >= job.request.ranks:
            awaited[job.job_id] = free.new_nodes(job.request)
        free.reserve_admitted(job.request, job.ranks_by_node)
    return awaited


def _located_first(admitted: Iterable[AdmittedJob]) -> list[AdmittedJob]:
    """Returns first the jobs of which it is known where they are, else in their order."""
    return sorted(admitted, key=lambda job: not job.ranks_by_node)


def _decide_one(
    job: QueuedJob,
    free: ClusterCapacity,
    empty: ClusterCapacity,
    blocked_by: dict[bool, str],
) -> AdmissionDecision:
    """Decides about one job; reserves its resources, or marks its kind as blocked."""
    request = job.request
    may_grow = job.retry_s is None
    room = empty.max_ranks(request, may_grow=may_grow)
    if room < request.ranks:
        # Checked before the queue: it has to wait for new nodes, so it blocks no other job.
        return _wait_for_nodes(job, room)
    # It might fit where the job ahead does not, and could then delay that job forever.
    if request.gpu in blocked_by:
        return _wait(job, f"queued behind {blocked_by[request.gpu]}")
    free_ranks = free.max_ranks(request, may_grow=may_grow)
    if free_ranks >= request.ranks:
        message = f"scheduled: {counted(request.ranks, f'{_kind(request)} rank')}"
        new_nodes = free.new_nodes(request)
        if new_nodes:
            message = f"{message}, on {describe_nodes(new_nodes, 'new node')}"
        free.reserve(request)
        return AdmissionDecision(job.job_id, True, None, message)
    # From here on this job blocks all later jobs of its kind.
    blocked_by[request.gpu] = job.job_id
    return _wait(job, f"needs {_needed(request)}; room for {free_ranks} now")


def _wait_for_nodes(job: QueuedJob, room: int) -> AdmissionDecision:
    """Decides about a job that the empty cluster cannot hold now."""
    needed = f"needs {_needed(job.request)}"
    if job.retry_s is None:
        return _wait(job, f"{needed}; the whole cluster has room for {room}")
    message = (
        f"{needed}, and new nodes did not come in time; they are requested again in "
        f"{job.retry_s:.0f} s, until then other jobs go first"
    )
    return AdmissionDecision(job.job_id, False, StatusReason.WAITING_NODES, message)


def _wait(job: QueuedJob, message: str) -> AdmissionDecision:
    return AdmissionDecision(job.job_id, False, StatusReason.WAITING_QUOTA, message)


def _needed(request: ResourceRequest) -> str:
    ranks = counted(request.ranks, f"{_kind(request)} rank")
    if request.island == 1:
        return ranks
    return f"{ranks} in groups of {request.island} on one node"


def _kind(request: ResourceRequest) -> str:
    if request.gpu:
        return "GPU"
    return "CPU"
