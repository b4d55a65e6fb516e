"""Admits queued jobs to their cluster, and cancels jobs.

Owns: the queue in the database. Works inside the caller's transaction. Must not know:
HTTP, the rule itself (`service.jobs.admission`).
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

from service.jobs import admission, lifecycle
from service.jobs.capacity import ClusterCapacity, ResourceRequest, resolved_request
from service.store.database import wake
from service.store.schema import AttemptRow, ClusterRow, JobRow
from workers.decisions.cluster_growth import describe_nodes
from workers.protocol.events import EventType
from workers.protocol.job import JobSpec
from workers.protocol.states import DesiredState, JobState, StatusReason
from workers.protocol.wire import AgentReport, NodeInfo

RETRY_NODES_S = 60.0
"""Seconds for which other jobs go first after new nodes for a job did not come."""


def active_jobs(session: Session, cluster: str) -> list[JobRow]:
    """Returns the jobs of a cluster that have not ended, oldest first."""
    statement = (
        sa.select(JobRow)
        .where(JobRow.cluster == cluster, JobRow.status.not_in(lifecycle.TERMINAL))
        .order_by(JobRow.number)
    )
    return list(session.scalars(statement))


def admit_jobs(session: Session, cluster: ClusterRow) -> None:
    """Decides about the queued jobs with the nodes that the agent has reported.

    Does nothing before the first report.
    """
    if cluster.report is None:
        return
    rows = active_jobs(session, cluster.name)
    # Runs with every report of the agent; usually the queue is empty.
    if not _has_queued(rows) and not _has_scheduling(rows):
        return
    report = AgentReport.model_validate(cluster.report)
    nodes = report.nodes
    jobs: dict[str, JobRow] = {}
    queued: list[admission.QueuedJob] = []
    for row in rows:
        jobs[row.id] = row
        if waits_for_room(row):
            queued.append(_queued(session, row))
    admitted = admitted_jobs(session, rows, nodes)
    # All at once, because each decision depends on the jobs ahead in the queue.
    for decision in admission.decide(queued, admitted, nodes, report.node_groups):
        _apply(session, jobs[decision.job_id], decision)
    if report.node_groups:
        awaited = admission.awaited_nodes(admitted, nodes, report.node_groups)
        for job_id, new_nodes in awaited.items():
            _show_awaited(session, jobs[job_id], new_nodes)


def room_beside_others(session: Session, job: JobRow) -> ClusterCapacity:
    """Returns what the other jobs of a job's cluster leave free, its own resources included.

    Jobs that wait in the queue come first. Nodes that an autoscaler may still give do not
    count.
    """
    cluster = lifecycle.lock_cluster(session, job.cluster)
    if cluster.report is None:
        return ClusterCapacity(())
    nodes = AgentReport.model_validate(cluster.report).nodes
    others = [row for row in active_jobs(session, job.cluster) if row.id != job.id]
    free = ClusterCapacity(nodes)
    for admitted in admitted_jobs(session, others, nodes):
        free.reserve_admitted(admitted.request, admitted.ranks_by_node)
    for row in others:
        if waits_for_room(row):
            free.reserve(request_of(row))
    return free


def waits_for_room(row: JobRow) -> bool:
    """Whether a job is in the queue and can be admitted.

    Without a size it was submitted before the cluster was known, and is resolved by the
    next report.
    """
    return row.world_size is not None and _is_queued(row)


def admitted_jobs(
    session: Session, rows: Iterable[JobRow], nodes: tuple[NodeInfo, ...]
) -> list[admission.AdmittedJob]:
    """Returns the jobs that hold resources, or may request them."""
    admitted = []
    for row in rows:
        if row.world_size is None or _is_queued(row):
            continue
        if JobState(row.status).holds_resources or row.desired == DesiredState.RUN:
            ranks_by_node = _ranks_by_node(session, row, nodes)
            admitted.append(admission.AdmittedJob(row.id, request_of(row), ranks_by_node))
    return admitted


def _queued(session: Session, row: JobRow) -> admission.QueuedJob:
    number = row.queue_number or row.number
    retry_s = _retry_s(session, row)
    return admission.QueuedJob(row.id, row.priority, number, request_of(row), retry_s)


def request_of(row: JobRow) -> ResourceRequest:
    """Returns the resources of a job whose size is known."""
    return resolved_request(JobSpec.model_validate(row.resolved_spec))


def note_missing_nodes(session: Session, job: JobRow) -> None:
    """Records that new nodes did not come, of a job that returns to the queue.

    Called before its state changes; does nothing for a job that did not wait for nodes.
    Other jobs go first for `RETRY_NODES_S` seconds.
    """
    if job.status_reason != StatusReason.WAITING_NODES:
        return
    event = lifecycle.NewEvent(
        EventType.NODES_MISSING,
        f"new nodes did not come within resources.placement_timeout_s ({job.message}); other "
        f"jobs go first for {RETRY_NODES_S:g} s",
        "warn",
    )
    lifecycle.add_event(session, job, event)


@dataclass(frozen=True)
class Cancelled:
    """What `cancel_all` has done with the jobs that it was given."""

    cancelled: tuple[JobRow, ...]
    """Jobs that are being cancelled or were cancelled at once."""
    ended: tuple[JobRow, ...]
    """Jobs that had ended already."""


def cancel_all(
    session: Session, job_ids: Iterable[str], *, final_checkpoint: bool
) -> Cancelled:
    """Requests cancellation of jobs, in the order given; ids of no job are left out."""
    chosen = sa.select(JobRow).where(
        JobRow.id.in_(list(job_ids)), JobRow.deleted_at.is_(None)
    )
    clusters = {}
    # By name: every transaction locks clusters in the same order.
    for name in sorted({job.cluster for job in session.scalars(chosen)}):
        clusters[name] = lifecycle.lock_cluster(session, name)
    # Read again, because the jobs may have changed before the locks were acquired.
    locked = chosen.with_for_update().execution_options(populate_existing=True)
    jobs = {job.id: job for job in session.scalars(locked)}
    cancelled = []
    ended = []
    for job_id in dict.fromkeys(job_ids):
        job = jobs.get(job_id)
        if job is None:
            continue
        if JobState(job.status).is_terminal:
            ended.append(job)
            continue
        lifecycle.cancel(session, job, final_checkpoint=final_checkpoint)
        cancelled.append(job)
    session.flush()
    # Once for all of them: until here no place was given to another job.
    for cluster in clusters.values():
        admit_jobs(session, cluster)
    return Cancelled(tuple(cancelled), tuple(ended))


def _has_queued(rows: list[JobRow]) -> bool:
    for row in rows:
        if _is_queued(row):
            return True
    return False


def _has_scheduling(rows: list[JobRow]) -> bool:
    for row in rows:
        if row.status == JobState.SCHEDULING:
            return True
    return False


def _is_queued(job: JobRow) -> bool:
    # An admitted job stays queued until its driver starts to place it.
    return job.status == JobState.QUEUED and job.desired == DesiredState.PREPARE


def _apply(session: Session, job: JobRow, decision: admission.AdmissionDecision) -> None:
    if decision.admit:
        job.desired = DesiredState.RUN
        job.status_reason = None
        job.message = decision.message
        lifecycle.add_event(
            session, job, lifecycle.NewEvent("job.admitted", decision.message)
        )
        lifecycle.desired_changed(session, job)
    elif (job.status_reason, job.message) != (decision.reason, decision.message):
        # Decided at every report, but readers are woken only by a new reason.
        job.status_reason = decision.reason
        job.message = decision.message
        wake(session, lifecycle.job_topic(job.id))


# ---- nodes that are not there yet


def _show_awaited(session: Session, job: JobRow, new_nodes: Mapping[str, int]) -> None:
    """Shows in the state of a job that is being placed which new nodes it waits for."""
    if job.status != JobState.SCHEDULING:
        return
    is_waiting = job.status_reason == StatusReason.WAITING_NODES
    if not new_nodes:
        # All of them are there; a moment later Ray places the job.
        if is_waiting:
            job.status_reason = None
            job.message = ""
        return
    text = f"waiting for {describe_nodes(new_nodes)}"
    if not is_waiting:
        job.status_reason = StatusReason.WAITING_NODES
        event = lifecycle.NewEvent(
            EventType.NODES_AWAITED, text, data={"new_nodes": dict(new_nodes)}
        )
        lifecycle.add_event(session, job, event)
        session.flush()
    # Readers are woken by the event only, not by every second.
    awaited = lifecycle.newest_event(session, job, EventType.NODES_AWAITED)
    waited_s = 0.0
    if awaited is not None:
        waited_s = time.time() - awaited.created_at
    job.message = f"{text}, {waited_s:.0f} s"


def _retry_s(session: Session, job: JobRow) -> float | None:
    """Returns the seconds until new nodes may be requested for a queued job again."""
    # The reason of a job whose nodes did not come, and until they may be requested again.
    if job.status_reason not in (StatusReason.WAITING_GANG, StatusReason.WAITING_NODES):
        return None
    missing = lifecycle.newest_event(session, job, EventType.NODES_MISSING)
    if missing is None:
        return None
    age_s = time.time() - missing.created_at
    # A clock that was set back must not keep the job waiting.
    if not 0 <= age_s < RETRY_NODES_S:
        return None
    return RETRY_NODES_S - age_s


def _ranks_by_node(
    session: Session, job: JobRow, nodes: tuple[NodeInfo, ...]
) -> dict[str, int]:
    """Returns where the ranks of the newest attempt are; empty while it is unknown."""
    attempt = session.get(AttemptRow, (job.number, job.attempt))
    if attempt is None:
        return {}
    alive = {node.node_id for node in nodes if node.alive}
    counts: dict[str, int] = {}
    for rank in attempt.ranks:
        node_id = rank.get("node_id")
        if node_id not in alive:
            # The map is out of date: the job is about to move to other nodes.
            return {}
        counts[node_id] = counts.get(node_id, 0) + 1
    return counts
