"""Lets running elastic jobs use what a cluster has free, and return it.

Owns: when a job has more replicas than it was submitted with. Works inside the caller's
transaction. Must not know: HTTP, how the ranks go on at another size, whether growing pays
(`workers.decisions.elasticity`).

A job in the queue comes first: while one waits, nothing grows, and jobs that have grown
return to their own size if that makes room for it.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session

from megatron_ray.validation import resolution
from service.jobs import lifecycle, queue
from service.jobs.admission import AdmittedJob
from service.jobs.capacity import ClusterCapacity, resolved_request
from service.jobs.elastic import resizing
from service.store.schema import AttemptRow, ClusterRow, JobRow
from workers.decisions import elasticity
from workers.decisions.elasticity import GrowthFacts
from workers.protocol.events import EventType
from workers.protocol.job import JobSpec
from workers.protocol.states import DesiredState, JobState
from workers.protocol.wire import AgentReport, NodeInfo

GROW_AGAIN_S = 600.0
"""Seconds for which a job keeps a size before it grows by itself."""
_SINCE = "room_since"
"""Entry of a job's progress: since when there has been room for more replicas."""
_BASE = "base_dp"
"""Field of a resize event: the size to which a job that has grown returns."""


def expand_jobs(session: Session, cluster: ClusterRow) -> None:
    """Grows a job that gains by it, or has jobs return what they were given.

    Called with every report of the agent, after the admission.
    """
    rows = queue.active_jobs(session, cluster.name)
    elastic = list(filter(_is_elastic, rows))
    if cluster.report is None or not elastic:
        return
    nodes = AgentReport.model_validate(cluster.report).nodes
    empty = ClusterCapacity(nodes)
    waiting = []
    for row in rows:
        # A job that the whole cluster cannot hold delays no other.
        if queue.waits_for_room(row) and _fits(row, empty):
            waiting.append(row)
    admitted = queue.admitted_jobs(session, rows, nodes)
    elastic.sort(key=_queue_order)
    if waiting:
        for row in elastic:
            _keep_since(row, None)
        first = min(waiting, key=_queue_order)
        _return_room(session, first, list(_grown_jobs(session, elastic)), admitted, nodes)
        return
    free = ClusterCapacity(nodes)
    for job in admitted:
        free.reserve_admitted(job.request, job.ranks_by_node)
    for row in elastic:
        # One at a time: what it takes is no longer free for the others.
        if _grow(session, row, free):
            return


def larger_dp(spec: JobSpec, free_ranks: int) -> int | None:
    """Returns the largest size for which there is room beside other jobs; None: its own.

    `free_ranks` are those for which there is room beside the job itself too.
    """
    dp = spec.parallel.dp
    assert isinstance(dp, int)
    room = resolution.world_size(spec) + free_ranks
    # The check of every size is not cheap.
    if spec.elastic is None or dp >= spec.elastic.max_dp or free_ranks <= 0:
        return None
    sizes = []
    for size in elasticity.legal_dps(spec):
        larger = elasticity.with_dp(spec, size)
        if size > dp and resolution.world_size(larger) <= room:
            sizes.append(size)
    return max(sizes, default=None)


# ---- growing


def _grow(session: Session, job: JobRow, free: ClusterCapacity) -> bool:
    """Whether a job grows now, which is then requested."""
    spec = JobSpec.from_mapping(job.resolved_spec)
    dp = larger_dp(spec, free.max_ranks(resolved_request(spec)))
    if dp is None or not _has_all_ranks(session, job) or _is_recent(session, job):
        _keep_since(job, None)
        return False
    now = time.time()
    since = job.progress.get(_SINCE)
    # A clock that was set back must not keep the job waiting.
    if since is None or since > now:
        _keep_since(job, now)
        return False
    facts = _facts(session, job, spec, dp, now - since)
    if facts is None:
        return False
    decision = elasticity.decide_growth(facts)
    if not decision.grow:
        return False
    base_dp = _base_dp(session, job) or spec.parallel.dp
    _keep_since(job, None)
    reason = f"growing, as the cluster has room ({decision.message})"
    resizing.set_dp(session, job, dp, reason, data={_BASE: base_dp})
    return True


def _facts(
    session: Session, job: JobRow, spec: JobSpec, dp: int, steady_s: float
) -> GrowthFacts | None:
    """Returns what is known of a job that could grow; None before its first steps."""
    attempt = session.get(AttemptRow, (job.number, job.attempt))
    running = lifecycle.newest_event(session, job, EventType.ATTEMPT_RUNNING)
    step_s = job.progress.get("step_s")
    step = job.progress.get("step")
    if attempt is None or attempt.started_at is None or running is None:
        return None
    if running.attempt != job.attempt or step_s is None or step is None:
        return None
    assert isinstance(spec.parallel.dp, int)
    return GrowthFacts(
        dp=spec.parallel.dp,
        full_dp=dp,
        steady_s=steady_s,
        step_s=step_s,
        remaining_steps=spec.training.num_steps - step,
        restart_s=running.created_at - attempt.started_at,
    )


def _has_all_ranks(session: Session, job: JobRow) -> bool:
    """Whether a job runs at the size that it was given, and not with fewer replicas."""
    attempt = session.get(AttemptRow, (job.number, job.attempt))
    return attempt is not None and len(attempt.ranks) == job.world_size


def _is_recent(session: Session, job: JobRow) -> bool:
    """Whether the size was changed a short time ago."""
    event = lifecycle.newest_event(session, job, EventType.JOB_RESIZING)
    return event is not None and 0 <= time.time() - event.created_at < GROW_AGAIN_S


def _keep_since(job: JobRow, since: float | None) -> None:
    """Stores since when there has been room for more replicas."""
    # Written only when it changes: this runs with every report.
    if job.progress.get(_SINCE) != since:
        job.progress = {**job.progress, _SINCE: since}


# ---- returning room


@dataclass(frozen=True)
class _GrownJob:
    row: JobRow
    base_dp: int
    """The size to which it returns."""


def _return_room(
    session: Session,
    first: JobRow,
    grown: Sequence[_GrownJob],
    admitted: Sequence[AdmittedJob],
    nodes: Sequence[NodeInfo],
) -> None:
    """Has grown jobs return to their size, if that makes room for the first in the queue.

    As few of them as possible: those of the lowest priority, of these the latest.
    """
    requests = {job.job_id: job.request for job in admitted}
    chosen = []
    for job in reversed(grown):
        chosen.append(job)
        spec = JobSpec.from_mapping(job.row.resolved_spec)
        requests[job.row.id] = resolved_request(elasticity.with_dp(spec, job.base_dp))
        free = ClusterCapacity(nodes)
        for request in requests.values():
            free.reserve(request)
        if _fits(first, free):
            break
    else:
        return
    for job in chosen:
        reason = f"returning room to {first.id}, which waits in the queue"
        resizing.set_dp(session, job.row, job.base_dp, reason)


def _grown_jobs(session: Session, elastic: Sequence[JobRow]) -> Iterator[_GrownJob]:
    for row in elastic:
        base_dp = _base_dp(session, row)
        if base_dp is not None:
            yield _GrownJob(row, base_dp)


def _base_dp(session: Session, job: JobRow) -> int | None:
    """Returns the size to which a job returns; None for one that did not grow by itself."""
    event = lifecycle.newest_event(session, job, EventType.JOB_RESIZING)
    if event is None:
        return None
    return event.data.get(_BASE)


# ---- jobs


def _is_elastic(job: JobRow) -> bool:
    is_running = job.status == JobState.RUNNING and job.desired == DesiredState.RUN
    return is_running and job.resolved_spec.get("elastic") is not None


def _fits(job: JobRow, capacity: ClusterCapacity) -> bool:
    request = queue.request_of(job)
    return capacity.max_ranks(request) >= request.ranks


def _queue_order(job: JobRow) -> tuple[int, int]:
    return -job.priority, job.queue_number or job.number
