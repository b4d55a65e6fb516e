"""Changes jobs. Only this module, `queue` and `pausing` do so.

Owns: creation, transitions, requests (cancel, checkpoint, delete) and events. Works
inside the caller's transaction. Must not know: HTTP, waiting, how records arrive.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from megatron_ray.config.problem import Problem
from service.exceptions import (
    JobActiveError,
    JobEndedError,
    JobNotRunningError,
    NotFoundError,
    joined,
)
from service.store.database import wake
from service.store.schema import (
    AttemptRow,
    CheckpointRow,
    ClusterRow,
    DiagnosisRow,
    EventRow,
    JobRow,
    LabelRow,
    MetricRow,
    ProfileRow,
    SourceRow,
)
from workers.protocol.events import EventType
from workers.protocol.states import (
    AttemptState,
    DesiredState,
    JobState,
    StatusReason,
    may_follow,
)

SERVICE = "service"
"""The source of the events that the service itself produces."""
TERMINAL = tuple([state.value for state in JobState if state.is_terminal])


@dataclass(frozen=True)
class NewEvent:
    """An event to be added to a job's history."""

    type: str
    message: str = ""
    level: str = "info"
    data: dict[str, Any] = field(default_factory=dict)
    ranks: tuple[int, ...] = ()
    source: str = SERVICE
    n: int | None = None
    """Number within the source; the service's own events take their seq."""
    attempt: int | None = None
    """None: the job's current attempt."""
    at: float | None = None
    """Seconds since the epoch by the source's clock; None: now."""
    actor: str = "system"


def job_topic(job_id: str) -> str:
    """Returns the topic that a job's streams and driver wait for."""
    return f"job/{job_id}"


def desired_topic(cluster: str) -> str:
    """Returns the topic that a cluster's agent waits for."""
    return f"desired/{cluster}"


# ---- finding and locking


def lock_cluster(session: Session, name: str) -> ClusterRow:
    """Returns the cluster's locked row, which the first call creates.

    Always locked before the rows of the cluster's jobs, which avoids deadlocks.
    """
    statement = sa.select(ClusterRow).where(ClusterRow.name == name).with_for_update()
    row = session.scalars(statement).one_or_none()
    if row is None:
        row = ClusterRow(name=name, revision=0)
        session.add(row)
        session.flush()
    return row


def lock(session: Session, job_id: str) -> JobRow:
    """Returns a job, locked for a change.

    Raises NotFoundError.
    """
    cluster = find(session, job_id).cluster
    lock_cluster(session, cluster)
    # populate_existing, because the job may have changed before the lock was acquired.
    statement = (
        sa.select(JobRow)
        .where(JobRow.id == job_id)
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    return session.scalars(statement).one()


def find(session: Session, job_id: str) -> JobRow:
    """Returns a job, for reading.

    Raises NotFoundError.
    """
    statement = sa.select(JobRow).where(JobRow.id == job_id, JobRow.deleted_at.is_(None))
    job = session.scalars(statement).one_or_none()
    if job is None:
        raise NotFoundError.of_field(
            "/path/job_id",
            "no_job",
            f"no job {job_id[:80]!r}; GET /v1/jobs lists all jobs",
        )
    return job


# ---- events and wake-ups


def add_event(session: Session, job: JobRow, event: NewEvent) -> None:
    """Appends an event to the job's history and wakes the job's streams."""
    # seq is assigned in the transaction that stores the event, so a rollback leaves no gap.
    job.last_seq += 1
    row = EventRow(
        job=job.number,
        seq=job.last_seq,
        source=event.source,
        n=event.n,
        attempt=event.attempt,
        created_at=event.at,
        level=event.level,
        type=event.type,
        message=event.message,
        data=event.data,
        ranks=list(event.ranks),
        actor=event.actor,
    )
    if event.n is None:
        row.n = job.last_seq
    if event.attempt is None:
        row.attempt = job.attempt
    if event.at is None:
        row.created_at = time.time()
    session.add(row)
    wake(session, job_topic(job.id))


def newest_event(session: Session, job: JobRow, event_type: EventType) -> EventRow | None:
    """Returns the newest event of a type; None if there is none."""
    statement = (
        sa.select(EventRow)
        .where(EventRow.job == job.number, EventRow.type == event_type)
        .order_by(EventRow.seq.desc())
        .limit(1)
    )
    return session.scalar(statement)


def desired_changed(session: Session, job: JobRow) -> None:
    """Announces a change of the job's desired state to its agent and driver."""
    # The job uses the cluster's counter, so agent and driver compare the same revisions.
    job.desired_revision = raise_revision(session, job.cluster)
    wake(session, job_topic(job.id))


def raise_revision(session: Session, cluster: str) -> int:
    """Raises and returns the counter that the cluster's long poll waits for."""
    row = lock_cluster(session, cluster)
    row.revision += 1
    wake(session, desired_topic(cluster))
    return row.revision


# ---- the life of a job


def create(
    session: Session,
    job: JobRow,
    labels: Mapping[str, str],
    *,
    event: NewEvent,
    is_agent_ready: bool,
) -> None:
    """Adds a job in state preparing; `event` is the first of its history.

    `is_agent_ready`: whether a live agent can start preparing it now.
    """
    enter_preparing(job, is_agent_ready=is_agent_ready)
    job.progress = {}
    job.last_seq = 0
    job.epoch = 0
    job.attempt = 0
    job.metrics_cursor = 0
    session.add(job)
    # The flush gives the job its number, which labels and events refer to.
    session.flush()
    set_labels(session, job, labels)
    add_event(session, job, event)
    desired_changed(session, job)


def set_labels(session: Session, job: JobRow, labels: Mapping[str, str]) -> None:
    """Replaces the labels by which a job is found."""
    session.execute(sa.delete(LabelRow).where(LabelRow.job == job.number))
    for key, value in labels.items():
        session.add(LabelRow(job=job.number, key=key, value=value))


def enter_preparing(job: JobRow, *, is_agent_ready: bool) -> None:
    """Sets a new or resumed job to preparing.

    `is_agent_ready`: whether a live agent can start preparing it now.
    """
    job.status = JobState.PREPARING
    job.desired = DesiredState.PREPARE
    job.pause_reason = None
    if is_agent_ready:
        job.status_reason = StatusReason.PREPARING_DATA
        job.message = ""
    else:
        job.status_reason = StatusReason.WAITING_AGENT
        job.message = f"waiting for the agent of cluster {job.cluster!r}"


def transition(
    session: Session,
    job: JobRow,
    new: JobState,
    reason: StatusReason | None,
    event: NewEvent,
) -> bool:
    """Changes the observed state if the table of transitions allows it.

    Returns whether the state changed. An illegal transition was sent by a driver with
    an outdated state; it is recorded in the history as `job.state_ignored`.
    """
    current = JobState(job.status)
    # Drivers may repeat a state, but a final state is applied only once.
    if not may_follow(current, new) or (current == new and new.is_terminal):
        _ignore_state(session, job, new, event)
        return False
    job.status = new
    job.status_reason = reason
    job.message = event.message
    at = event.at
    if at is None:
        at = time.time()
    # Only the first start of training counts; later ones are recoveries.
    if new is JobState.RUNNING and job.started_at is None:
        job.started_at = at
    if new is JobState.QUEUED:
        # A job that returns to the queue must be admitted again, unless it is being paused.
        if job.desired != DesiredState.PAUSE:
            job.desired = DesiredState.PREPARE
        _assign_queue_number(session, job)
    if new.is_terminal:
        job.ended_at = at
        _close_attempts(session, job)
    add_event(session, job, event)
    # The driver of an ended job must exit, and that of a queued job must wait for
    # admission.
    if new.is_terminal or new is JobState.QUEUED:
        desired_changed(session, job)
    return True


def fail(session: Session, job: JobRow, problems: list[Problem], event: NewEvent) -> None:
    """Fails a job with problems that were found after its submission."""
    if JobState(job.status).is_terminal:
        return
    detail = joined(problems)
    if transition(session, job, JobState.FAILED, StatusReason.SPEC_INVALID, event):
        job.message = detail
        job.problem = stored_problem("spec_invalid", detail, problems)


def cancel(session: Session, job: JobRow, *, final_checkpoint: bool) -> None:
    """Requests cancellation; a job without a driver ends at once.

    Does nothing for a job that has ended or is being cancelled.
    """
    if JobState(job.status).is_terminal or job.desired == DesiredState.CANCEL:
        return
    job.desired = DesiredState.CANCEL
    job.pause_reason = None
    job.final_checkpoint = final_checkpoint
    data = {"checkpoint": final_checkpoint}
    event = NewEvent("job.cancelling", "cancellation requested", data=data, actor="user")
    transition(session, job, JobState.CANCELLING, StatusReason.USER_CANCELLED, event)
    desired_changed(session, job)
    # Epoch 0: no driver has connected, so none would report the end.
    if job.epoch == 0:
        event = NewEvent("job.cancelled", "cancelled before it started", actor="user")
        transition(session, job, JobState.CANCELLED, StatusReason.USER_CANCELLED, event)


def request_checkpoint(session: Session, job: JobRow) -> None:
    """Requests one checkpoint now.

    Raises JobEndedError, and JobNotRunningError while nothing trains.
    """
    state = JobState(job.status)
    if state.is_terminal:
        raise JobEndedError(
            f"the job has ended ({state.value}); only a running job can write a checkpoint"
        )
    if state is JobState.CANCELLING:
        raise JobNotRunningError(
            "the job is being cancelled; only a running job can write a checkpoint"
        )
    if state is not JobState.RUNNING:
        raise JobNotRunningError(f"the job is {state.value}; wait until it is running")
    # A counter instead of a flag, so that two requests cause two checkpoints.
    job.checkpoint_requests += 1
    event = NewEvent("checkpoint.requested", "checkpoint requested", actor="user")
    add_event(session, job, event)
    desired_changed(session, job)


def request_diagnosis(session: Session, job: JobRow) -> None:
    """Requests that all ranks are examined now.

    Raises JobEndedError, and JobNotRunningError while no rank exists.
    """
    state = JobState(job.status)
    if state.is_terminal:
        raise JobEndedError(
            f"the job has ended ({state.value}); only the ranks of a running job can be examined"
        )
    if not state.holds_resources:
        raise JobNotRunningError(f"the job is {state.value}; it has no ranks now")
    job.diagnosis_requests += 1
    event = NewEvent("diagnosis.requested", "diagnosis requested", actor="user")
    add_event(session, job, event)
    desired_changed(session, job)


def delete(session: Session, job: JobRow) -> None:
    """Deletes an ended job and its history.

    The row keeps its id, so that leftovers of the job in the cluster can be identified
    and removed. Raises JobActiveError.
    """
    state = JobState(job.status)
    if state is JobState.CANCELLING:
        raise JobActiveError("the job is being cancelled; wait until it has ended")
    if not state.is_terminal:
        raise JobActiveError(
            f"the job is {state.value}; cancel it first (POST /v1/jobs/{job.id}/cancel) "
            "and wait until it has ended"
        )
    # The job's own row is kept, so no foreign key deletes these rows.
    tables = (EventRow, MetricRow, AttemptRow, CheckpointRow, DiagnosisRow)
    for table in (*tables, ProfileRow, SourceRow, LabelRow):
        session.execute(sa.delete(table).where(table.job == job.number))
    job.deleted_at = time.time()
    job.spec = {}
    job.resolved_spec = {}
    job.progress = {}
    job.prepared = None
    job.problem = None
    job.last_checkpoint = None
    # Open streams find `deleted_at` set and end.
    wake(session, job_topic(job.id))


def stored_problem(
    code: str, detail: str, problems: Iterable[Problem] = (), **extra: Any
) -> dict[str, Any]:
    """Returns a job's failure in the format of its row."""
    errors = [asdict(problem) for problem in problems]
    return {"code": code, "detail": detail, "errors": errors, **extra}


def _ignore_state(session: Session, job: JobRow, new: JobState, event: NewEvent) -> None:
    message = f"ignored state {new.value} from the driver; the job stays {job.status}"
    ignored = NewEvent(
        "job.state_ignored",
        message,
        data={"state": new.value},
        source=event.source,
        n=event.n,
        at=event.at,
    )
    add_event(session, job, ignored)


def _close_attempts(session: Session, job: JobRow) -> None:
    """Ends open attempts with the job, because a killed driver does not report them."""
    state = AttemptState.STOPPED
    if job.status == JobState.SUCCEEDED:
        state = AttemptState.SUCCEEDED
    statement = sa.select(AttemptRow).where(
        AttemptRow.job == job.number, AttemptRow.ended_at.is_(None)
    )
    for row in session.scalars(statement):
        row.state = state
        row.reason = job.status_reason
        row.ended_at = job.ended_at


def _assign_queue_number(session: Session, job: JobRow) -> None:
    # A job that returns to the queue keeps its number and so its position.
    if job.queue_number is not None:
        return
    statement = sa.select(sa.func.max(JobRow.queue_number))
    last = session.scalar(statement.where(JobRow.cluster == job.cluster))
    job.queue_number = (last or 0) + 1
