"""Decides which queued jobs may request resources from Ray.

Owns: the queue's rule. Pure. Must not know: the database, HTTP, Ray.

Jobs are ordered by priority, then by time of queueing. A waiting job blocks later jobs
that need the same kind of rank (with or without GPU), so small jobs never starve a
large one. A job that exceeds the empty cluster blocks no other job.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from service.jobs.capacity import ClusterCapacity, ResourceRequest
from workers.protocol.states import StatusReason
from workers.protocol.wire import NodeInfo


@dataclass(frozen=True)
class QueuedJob:
    """A job in the queue."""

    job_id: str
    priority: int
    queue_number: int
    """Smaller was queued earlier."""
    request: ResourceRequest


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
    queued: Iterable[QueuedJob], admitted: Iterable[AdmittedJob], nodes: Sequence[NodeInfo]
) -> list[AdmissionDecision]:
    """Returns one decision per queued job, in the order of the queue."""
    # Resources that admitted jobs leave free.
    free = ClusterCapacity(nodes)
    for job in admitted:
        free.reserve_admitted(job.request, job.ranks_by_node)
    # The first waiting job by kind of rank (with or without GPU).
    blocked_by: dict[bool, str] = {}
    decisions = []
    for candidate in sorted(queued, key=lambda job: (-job.priority, job.queue_number)):
        empty = ClusterCapacity(nodes)
        decisions.append(_decide_one(candidate, free, empty, blocked_by))
    return decisions


def _decide_one(
    job: QueuedJob,
    free: ClusterCapacity,
    empty: ClusterCapacity,
    blocked_by: dict[bool, str],
) -> AdmissionDecision:
    """Decides about one job; reserves its resources, or marks its kind as blocked."""
    request = job.request
    if empty.max_ranks(request) < request.ranks:
        # Checked before the queue: it has to wait for new nodes, so it blocks no other job.
        room = empty.max_ranks(request)
        return _wait(
            job, f"needs {_needed(request)}; the whole cluster has room for {room}"
        )
    # It might fit where the job ahead does not, and could then delay that job forever.
    if request.gpu in blocked_by:
        return _wait(job, f"queued behind {blocked_by[request.gpu]}")
    free_ranks = free.max_ranks(request)
    if free.reserve(request):
        message = f"scheduled: {request.ranks} {_kind(request)} ranks"
        return AdmissionDecision(job.job_id, True, None, message)
    # From here on this job blocks all later jobs of its kind.
    blocked_by[request.gpu] = job.job_id
    return _wait(job, f"needs {_needed(request)}; room for {free_ranks} now")


def _wait(job: QueuedJob, message: str) -> AdmissionDecision:
    return AdmissionDecision(job.job_id, False, StatusReason.WAITING_QUOTA, message)


def _needed(request: ResourceRequest) -> str:
    ranks = f"{request.ranks} {_kind(request)} ranks"
    if request.island == 1:
        return ranks
    return f"{ranks} in groups of {request.island} on one node"


def _kind(request: ResourceRequest) -> str:
    if request.gpu:
        return "GPU"
    return "CPU"
