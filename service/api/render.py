"""Rows as bodies.

Owns: what the public API shows of a table, and paging. Must not know: requests.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TypeVar

import sqlalchemy as sa
from sqlalchemy.orm import Session

from service.api.models import (
    Attempt,
    Checkpoint,
    Cluster,
    Event,
    Job,
    JobSummary,
    LastCheckpoint,
    Node,
    Page,
    Progress,
)
from service.jobs.agents import Agents
from service.store.schema import (
    AttemptRow,
    CheckpointRow,
    ClusterRow,
    EventRow,
    JobRow,
    LabelRow,
)
from workers.protocol.states import DesiredState, JobState, StatusReason
from workers.protocol.wire import AgentReport

Item = TypeVar("Item")


def moment(seconds: float) -> datetime:
    """Seconds since the epoch as UTC."""
    return datetime.fromtimestamp(seconds, UTC)


def moment_or_none(seconds: float | None) -> datetime | None:
    """The same, where it may not have happened yet."""
    return None if seconds is None else moment(seconds)


def page(items: Sequence[Item], ids: Sequence[str], *, has_more: bool) -> Page[Item]:
    """One page of a list."""
    return Page(
        data=list(items),
        first_id=ids[0] if ids else None,
        last_id=ids[-1] if ids else None,
        has_more=has_more,
    )


def summaries(session: Session, rows: Sequence[JobRow]) -> list[JobSummary]:
    """Jobs without their specs."""
    labels = _labels(session, rows)
    return [_summary(row, labels.get(row.number, {})) for row in rows]


def job(session: Session, row: JobRow) -> Job:
    """A job with everything."""
    summary = summaries(session, [row])[0]
    fields = {name: getattr(summary, name) for name in JobSummary.model_fields}
    return Job(**fields, spec=row.spec, resolved_spec=row.resolved_spec)


def event(job_id: str, row: EventRow) -> Event:
    """One line of a history."""
    return Event(
        id=f"{job_id}.{row.seq}",
        seq=row.seq,
        job_id=job_id,
        attempt=row.attempt,
        created_at=moment(row.created_at),
        level=row.level,
        type=row.type,
        message=row.message,
        data=row.data,
        ranks=row.ranks,
        actor=row.actor,
    )


def attempt(row: AttemptRow) -> Attempt:
    """One attempt."""
    return Attempt(
        attempt=row.attempt,
        state=row.state,
        reason=row.reason,
        message=row.message,
        world_size=row.world_size,
        started_at=moment_or_none(row.started_at),
        ended_at=moment_or_none(row.ended_at),
    )


def checkpoint(row: CheckpointRow) -> Checkpoint:
    """One checkpoint."""
    return Checkpoint(
        step=row.step,
        attempt=row.attempt,
        path=row.path,
        committed_at=moment(row.committed_at),
        bytes=row.bytes,
        loss=row.loss,
    )


def cluster(name: str, row: ClusterRow | None, agents: Agents) -> Cluster:
    """A cluster, known or not."""
    report = (
        None
        if row is None or row.report is None
        else AgentReport.model_validate(row.report)
    )
    return Cluster(
        name=name,
        live=agents.is_live(name),
        agent_silence_s=agents.silence_s(name),
        reported_at=moment_or_none(None if row is None else row.reported_at),
        agent_id=report and report.agent_id,
        code_version=report and report.code_version,
        ray_version=report and report.ray_version,
        namespace=report and report.namespace,
        dashboard_url=report and report.dashboard_url,
        nodes=[Node(**node.model_dump()) for node in report.nodes] if report else [],
        drivers=[driver.model_dump() for driver in report.drivers] if report else [],
        orphans=list(report.orphans) if report else [],
    )


def _labels(session: Session, rows: Sequence[JobRow]) -> dict[int, dict[str, str]]:
    found: dict[int, dict[str, str]] = {}
    for label in session.scalars(
        sa.select(LabelRow)
        .where(LabelRow.job.in_([row.number for row in rows]))
        .order_by(LabelRow.key)
    ):
        found.setdefault(label.job, {})[label.key] = label.value
    return found


def _summary(row: JobRow, labels: dict[str, str]) -> JobSummary:
    last = row.last_checkpoint
    return JobSummary(
        id=row.id,
        name=row.name,
        status=JobState(row.status),
        status_reason=None
        if row.status_reason is None
        else StatusReason(row.status_reason),
        message=row.message,
        desired_state=DesiredState(row.desired),
        cluster=row.cluster,
        priority=row.priority,
        metadata=labels,
        created_at=moment(row.created_at),
        started_at=moment_or_none(row.started_at),
        ended_at=moment_or_none(row.ended_at),
        attempt=row.attempt,
        failures=row.failures,
        preemptions=row.preemptions,
        progress=_progress(row),
        problem=row.problem,
        storage_path=row.job_dir,
        last_checkpoint=last
        and LastCheckpoint(
            step=last["step"], path=last["path"], committed_at=moment(last["committed_at"])
        ),
    )


def _progress(row: JobRow) -> Progress:
    seen = row.progress
    steps = int(row.resolved_spec["training"]["steps"])
    step = seen.get("step")
    step_s = seen.get("step_s")
    eta_s = None
    if row.status == JobState.RUNNING and step is not None and step_s is not None:
        eta_s = max(0, steps - step) * step_s
    return Progress(
        step=step,
        steps=steps,
        loss=seen.get("loss"),
        tokens_per_s=seen.get("tokens_per_s"),
        eta_s=eta_s,
        mfu=seen.get("mfu"),
        val_loss=seen.get("val_loss"),
        unigram_nats=seen.get("unigram_nats"),
    )
