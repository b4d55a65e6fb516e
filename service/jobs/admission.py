"""Who may ask Ray for resources next.

Owns: the queue's rule. Pure. Must not know: the database, HTTP, Ray.

Higher priority first, then first come, first served. A job that must wait holds back
those behind it that want the same kind of rank (with a GPU or without), so a large job
is never starved by small ones. A job that the whole cluster could not hold holds back
nobody.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from service.jobs.capacity import ClusterCapacity, ResourceRequest
from workers.protocol.states import StatusReason
from workers.protocol.wire import NodeInfo


@dataclass(frozen=True)
class Waiting:
    """A job in the queue."""

    job_id: str
    priority: int
    place: int
    """Smaller came earlier."""
    need: ResourceRequest


@dataclass(frozen=True)
class Held:
    """A job that has been admitted and is not over."""

    job_id: str
    need: ResourceRequest
    placed: Mapping[str, int] = field(default_factory=dict)
    """Node id -> ranks there; empty while not known."""


@dataclass(frozen=True)
class Decision:
    """The answer for one waiting job."""

    job_id: str
    admit: bool
    reason: StatusReason | None
    message: str


def decide(
    waiting: Iterable[Waiting], held: Iterable[Held], nodes: Sequence[NodeInfo]
) -> list[Decision]:
    """One decision per waiting job, in the order of the queue."""
    free = ClusterCapacity(nodes)
    for holder in held:
        free.hold(holder.need, holder.placed)
    blocked_by: dict[bool, str] = {}
    decisions = []
    for job in sorted(waiting, key=lambda job: (-job.priority, job.place)):
        decisions.append(_decide_one(job, free, ClusterCapacity(nodes), blocked_by))
    return decisions


def _decide_one(
    job: Waiting, free: ClusterCapacity, whole: ClusterCapacity, blocked_by: dict[bool, str]
) -> Decision:
    need = job.need
    kind = "GPU" if need.gpu else "CPU"
    if whole.ranks(need) < need.ranks:
        text = (
            f"waits for nodes: {need.ranks} {kind} ranks in islands of {need.island}, the "
            f"whole cluster has room for {whole.ranks(need)}"
        )
        return Decision(job.job_id, False, StatusReason.WAITING_QUOTA, text)
    if need.gpu in blocked_by:
        return Decision(
            job.job_id,
            False,
            StatusReason.WAITING_QUOTA,
            f"waits behind {blocked_by[need.gpu]}",
        )
    free_ranks = free.ranks(need)
    if free.take(need):
        return Decision(
            job.job_id,
            True,
            None,
            f"admitted: {need.ranks} {kind} ranks, there was room for {free_ranks}",
        )
    blocked_by[need.gpu] = job.job_id
    text = (
        f"waits for room: {need.ranks} {kind} ranks in islands of {need.island}, there is room "
        f"for {free_ranks} now"
    )
    return Decision(job.job_id, False, StatusReason.WAITING_QUOTA, text)
