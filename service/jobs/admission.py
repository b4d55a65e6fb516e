"""Decides which queued jobs may ask Ray for resources.

Owns: the queue's rule. Pure. Must not know: the database, HTTP, Ray.

Higher priority goes first, then the job that was queued first. A job that must wait holds
back those behind it that need the same kind of rank (with a GPU or without), so a large
job is never starved by small ones. A job that even the empty cluster could not hold holds
back no other.
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
    # What is left beside the jobs that were admitted before.
    free = ClusterCapacity(nodes)
    for job in admitted:
        free.reserve_admitted(job.request, job.ranks_by_node)
    # By kind of rank (with a GPU or without): the job that waits at the head of it.
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
    """Decides about one job; reserves its room, or notes that it blocks its kind."""
    request = job.request
    if empty.max_ranks(request) < request.ranks:
        # Checked before the queue: it must wait for new nodes, so it blocks no other.
        room = empty.max_ranks(request)
        return _wait(
            job, f"needs {_needed(request)}; the whole cluster has room for {room}"
        )
    # It might fit where the job ahead does not, and would then delay that job for ever.
    if request.gpu in blocked_by:
        return _wait(job, f"queued behind {blocked_by[request.gpu]}")
    free_ranks = free.max_ranks(request)
    if free.reserve(request):
        message = f"scheduled: {request.ranks} {_kind(request)} ranks"
        return AdmissionDecision(job.job_id, True, None, message)
    # From here on this job holds back all others of its kind.
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
