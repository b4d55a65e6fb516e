"""The only code that changes a job.

Owns: creation, transitions, wishes (run, cancel, checkpoint), events, the queue.

Works inside the caller's transaction. Must not know: HTTP, waiting, how records arrive.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from megatron_ray.config.problem import Problem
from service.http.errors import ProblemError, document
from service.jobs import admission
from service.jobs.capacity import need_of
from service.store.database import wake
from service.store.schema import (
    AttemptRow,
    CheckpointRow,
    ClusterRow,
    EventRow,
    JobRow,
    LabelRow,
    MetricRow,
    SourceRow,
)
from workers.protocol.job import JobSpec
from workers.protocol.states import (
    AttemptState,
    DesiredState,
    JobState,
    StatusReason,
    may_follow,
)
from workers.protocol.wire import AgentReport, NodeInfo

SERVICE = "service"
TERMINAL = tuple(state.value for state in JobState if state.is_terminal)


@dataclass(frozen=True)
class NewEvent:
    """One thing that happened, as it goes into the history."""

    type: str
    message: str = ""
    level: str = "info"
    data: dict[str, Any] = field(default_factory=dict)
    ranks: tuple[int, ...] = ()
    source: str = SERVICE
    n: int | None = None
    """Number within the source; the service's own facts take their seq."""
    attempt: int | None = None
    at: float | None = None
    actor: str = "system"


def job_topic(job_id: str) -> str:
    """What a job's streams wait for."""
    return f"job/{job_id}"


def desired_topic(cluster: str) -> str:
    """What a cluster's agent waits for."""
    return f"desired/{cluster}"


def lock_cluster(session: Session, name: str) -> ClusterRow:
    """The cluster's row, locked; taken before any of its jobs, so that two writers
    cannot wait for each other.
    """
    found = session.scalars(
        sa.select(ClusterRow).where(ClusterRow.name == name).with_for_update()
    ).one_or_none()
    if found is None:
        found = ClusterRow(name=name, revision=0)
        session.add(found)
        session.flush()
    return found


def lock(session: Session, job_id: str) -> JobRow:
    """The job, locked for change. Raises ProblemError not_found."""
    cluster = find(session, job_id).cluster
    lock_cluster(session, cluster)
    statement = (
        sa.select(JobRow)
        .where(JobRow.id == job_id)
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    return session.scalars(statement).one()


def find(session: Session, job_id: str) -> JobRow:
    """The job, for reading. Raises ProblemError not_found."""
    found = session.scalars(
        sa.select(JobRow).where(JobRow.id == job_id, JobRow.deleted_at.is_(None))
    ).one_or_none()
    if found is None:
        raise ProblemError(
            "not_found", f"there is no job {job_id[:80]!r}; GET /v1/jobs lists them"
        )
    return found


def create(session: Session, job: JobRow, labels: dict[str, str], *, known: bool) -> None:
    """Adds a job in state preparing; `known`: an agent is there to prepare it."""
    job.status = JobState.PREPARING
    job.desired = DesiredState.PREPARE
    job.status_reason = StatusReason.PREPARING_DATA if known else StatusReason.WAITING_AGENT
    job.message = "" if known else f"waits for the agent of cluster {job.cluster!r}"
    job.progress = {}
    job.last_seq = 0
    job.epoch = 0
    job.attempt = 0
    job.metrics_cursor = 0
    session.add(job)
    session.flush()
    session.add_all(
        LabelRow(job=job.number, key=key, value=value) for key, value in labels.items()
    )
    add_event(
        session, job, NewEvent("job.created", f"job {job.name!r} was created", actor="user")
    )
    changed(session, job)


def add_event(session: Session, job: JobRow, fact: NewEvent) -> None:
    """Appends to the history; the sequence number is given here, in the transaction
    that stores it.
    """
    job.last_seq += 1
    row = EventRow(
        job=job.number,
        seq=job.last_seq,
        source=fact.source,
        n=job.last_seq if fact.n is None else fact.n,
        attempt=job.attempt if fact.attempt is None else fact.attempt,
        created_at=time.time() if fact.at is None else fact.at,
        level=fact.level,
        type=fact.type,
        message=fact.message,
        data=fact.data,
        ranks=list(fact.ranks),
        actor=fact.actor,
    )
    session.add(row)
    wake(session, job_topic(job.id))


def changed(session: Session, job: JobRow) -> None:
    """What is wanted of the job has changed: agent and driver must hear of it."""
    job.desired_revision = raise_revision(session, job.cluster)
    wake(session, job_topic(job.id))


def raise_revision(session: Session, cluster: str) -> int:
    """Moves the counter that the cluster's long poll watches."""
    row = lock_cluster(session, cluster)
    row.revision += 1
    wake(session, desired_topic(cluster))
    return row.revision


def transition(
    session: Session,
    job: JobRow,
    new: JobState,
    reason: StatusReason | None,
    fact: NewEvent,
) -> bool:
    """Moves the observed state if the table allows it, and writes the history either
    way.

    A state that may not follow is a late word of a driver that has not yet heard: it is
    kept as `job.state_ignored`.
    """
    current = JobState(job.status)
    if not may_follow(current, new) or (current == new and new.is_terminal):
        text = f"the driver said {new.value}, the job stays {current.value}"
        add_event(
            session,
            job,
            NewEvent(
                "job.state_ignored",
                text,
                data={"state": new.value},
                source=fact.source,
                n=fact.n,
                at=fact.at,
            ),
        )
        return False
    job.status = new
    job.status_reason = reason
    job.message = fact.message
    at = time.time() if fact.at is None else fact.at
    if new is JobState.RUNNING and job.started_at is None:
        job.started_at = at
    if new is JobState.QUEUED:
        job.desired = DesiredState.PREPARE
        _enqueue(session, job)
    if new.is_terminal:
        job.ended_at = at
        _close_attempts(session, job)
    add_event(session, job, fact)
    if new.is_terminal or new is JobState.QUEUED:
        changed(session, job)
    return True


def _close_attempts(session: Session, job: JobRow) -> None:
    """What has no end by now gets the job's: a driver that is cancelled or killed may
    never tell it.
    """
    state = (
        AttemptState.SUCCEEDED if job.status == JobState.SUCCEEDED else AttemptState.STOPPED
    )
    for row in session.scalars(
        sa.select(AttemptRow).where(
            AttemptRow.job == job.number, AttemptRow.ended_at.is_(None)
        )
    ):
        row.state = state
        row.reason = job.status_reason
        row.ended_at = job.ended_at


def fail(session: Session, job: JobRow, problems: list[Problem], fact: NewEvent) -> None:
    """The user's mistake, found after the job was accepted."""
    if JobState(job.status).is_terminal:
        return
    detail = "; ".join(f"{item.pointer}: {item.detail}" for item in problems)
    if transition(session, job, JobState.FAILED, StatusReason.SPEC_INVALID, fact):
        job.message = detail
        job.problem = document("spec_invalid", detail, problems)


def cancel(session: Session, job: JobRow, *, final_checkpoint: bool) -> None:
    """Asks for the job's end; one that no driver has taken up ends here and now.

    Harmless when asked again.
    """
    state = JobState(job.status)
    if state.is_terminal or job.desired == DesiredState.CANCEL:
        return
    job.desired = DesiredState.CANCEL
    job.final_checkpoint = final_checkpoint
    fact = NewEvent(
        "job.cancelling",
        "the user asked for the job's end",
        data={"checkpoint": final_checkpoint},
        actor="user",
    )
    transition(session, job, JobState.CANCELLING, StatusReason.USER_CANCELLED, fact)
    changed(session, job)
    if job.epoch == 0:
        fact = NewEvent(
            "job.cancelled", "cancelled before a driver had taken it up", actor="user"
        )
        transition(session, job, JobState.CANCELLED, StatusReason.USER_CANCELLED, fact)


def request_checkpoint(session: Session, job: JobRow) -> None:
    """Asks for one checkpoint now.

    Raises ProblemError job_ended, or job_active while nothing trains.
    """
    state = JobState(job.status)
    if state.is_terminal:
        raise ProblemError(
            "job_ended",
            f"the job has {state.value}; only a running job can write a checkpoint",
        )
    if state is not JobState.RUNNING:
        raise ProblemError(
            "job_active", f"the job is {state.value}; wait until it is running"
        )
    job.checkpoint_requests += 1
    add_event(
        session,
        job,
        NewEvent("checkpoint.requested", "the user asked for a checkpoint", actor="user"),
    )
    changed(session, job)


def delete(session: Session, job: JobRow) -> None:
    """Forgets an ended job and its history; its id stays known, so that leftovers in
    the cluster can be told apart.
    """
    state = JobState(job.status)
    if not state.is_terminal:
        raise ProblemError(
            "job_active",
            f"the job is {state.value}; cancel it first (POST /v1/jobs/{job.id}/cancel) "
            "and wait for its end",
        )
    for table in (EventRow, MetricRow, AttemptRow, CheckpointRow, SourceRow, LabelRow):
        session.execute(sa.delete(table).where(table.job == job.number))
    job.deleted_at = time.time()
    job.spec = {}
    job.resolved_spec = {}
    job.progress = {}
    job.prepared = job.problem = job.last_checkpoint = None
    wake(session, job_topic(job.id))


def active(session: Session, cluster: str) -> list[JobRow]:
    """Jobs of a cluster that are not over, oldest first."""
    statement = (
        sa.select(JobRow)
        .where(JobRow.cluster == cluster, JobRow.status.not_in(TERMINAL))
        .order_by(JobRow.number)
    )
    return list(session.scalars(statement))


def admit(session: Session, cluster: ClusterRow) -> None:
    """Decides about the queue with what the cluster has reported; does nothing while
    that is unknown.
    """
    if cluster.report is None:
        return
    nodes = AgentReport.model_validate(cluster.report).nodes
    rows = {
        row.id: row for row in active(session, cluster.name) if row.world_size is not None
    }
    queued = [
        row
        for row in rows.values()
        if row.status == JobState.QUEUED and row.desired == DesiredState.PREPARE
    ]
    if not queued:
        return
    waiting = []
    held = []
    for row in rows.values():
        need = need_of(
            JobSpec.model_validate(row.resolved_spec), row.world_size or 0, has_gpus=False
        )
        if row in queued:
            waiting.append(
                admission.Waiting(
                    row.id, row.priority, row.queue_number or row.number, need
                )
            )
        elif JobState(row.status).holds_resources or row.desired == DesiredState.RUN:
            held.append(admission.Held(row.id, need, _placed(session, row, nodes)))
    for decision in admission.decide(waiting, held, nodes):
        _apply(session, rows[decision.job_id], decision)


def _apply(session: Session, job: JobRow, decision: admission.Decision) -> None:
    if decision.admit:
        job.desired = DesiredState.RUN
        job.status_reason = None
        job.message = decision.message
        add_event(session, job, NewEvent("job.admitted", decision.message))
        changed(session, job)
    elif (job.status_reason, job.message) != (decision.reason, decision.message):
        job.status_reason = decision.reason
        job.message = decision.message
        wake(session, job_topic(job.id))


def _placed(session: Session, job: JobRow, nodes: tuple[NodeInfo, ...]) -> dict[str, int]:
    row = session.get(AttemptRow, (job.number, job.attempt))
    alive = {node.node_id for node in nodes if node.alive}
    found: dict[str, int] = {}
    for rank in row.ranks if row is not None else ():
        node = rank.get("node_id")
        if node not in alive:
            return {}  # the map is out of date: the job is on its way to other nodes
        found[node] = found.get(node, 0) + 1
    return found


def _enqueue(session: Session, job: JobRow) -> None:
    if job.queue_number is None:
        last = session.scalar(
            sa.select(sa.func.max(JobRow.queue_number)).where(JobRow.cluster == job.cluster)
        )
        job.queue_number = (last or 0) + 1
