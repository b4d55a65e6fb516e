"""Stores what a job's driver learned of all ranks at one moment.

Owns: the events of diagnoses, and how many a job keeps. Must not know: HTTP, how ranks
are examined.
"""

from typing import Any, Literal

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from service.jobs import lifecycle
from service.jobs.lifecycle import NewEvent
from service.store.schema import DiagnosisRow, JobRow
from workers.protocol.events import EventType
from workers.protocol.wire import Record

MAX_DIAGNOSES = 20
"""Newest diagnoses that a job keeps; each has the stacks of its ranks."""


class _Culprit(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    rank: int
    node_id: str = ""
    address: str = ""


class _Report(BaseModel):
    """The fields that the event shows; all of them are stored as they came."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    trigger: Literal["hang", "request"]
    reason: str
    confidence: str
    culprits: tuple[_Culprit, ...] = Field(default=(), max_length=1000)


def apply(session: Session, job: JobRow, source: str, record: Record) -> None:
    """Stores a record of kind `diagnosis` and its event. Raises ValidationError."""
    report = _Report.model_validate(record.data)
    event_type = EventType.JOB_DIAGNOSED
    level = "info"
    if report.trigger == "hang":
        event_type = EventType.ATTEMPT_HANG
        level = "warn"
    culprits = []
    ranks = []
    for culprit in report.culprits:
        culprits.append(culprit.model_dump())
        ranks.append(culprit.rank)
    event = NewEvent(
        event_type,
        report.reason,
        level,
        {"culprits": culprits, "confidence": report.confidence},
        tuple(ranks),
        source=source,
        n=record.n,
        attempt=record.attempt,
        at=record.at,
    )
    lifecycle.add_event(session, job, event)
    row = DiagnosisRow(job=job.number, seq=job.last_seq, attempt=record.attempt)
    row.created_at = record.at
    row.report = record.data
    session.add(row)
    session.flush()
    _drop_old(session, job)


def newest(session: Session, job: JobRow) -> DiagnosisRow | None:
    """Returns the newest diagnosis of a job; None before the first."""
    statement = sa.select(DiagnosisRow).where(DiagnosisRow.job == job.number)
    return session.scalars(statement.order_by(DiagnosisRow.seq.desc()).limit(1)).first()


def _drop_old(session: Session, job: JobRow) -> None:
    mine: Any = DiagnosisRow.job == job.number
    statement = sa.select(DiagnosisRow.seq).where(mine).order_by(DiagnosisRow.seq.desc())
    oldest_kept = session.scalars(statement.offset(MAX_DIAGNOSES - 1).limit(1)).first()
    if oldest_kept is not None:
        session.execute(sa.delete(DiagnosisRow).where(mine, DiagnosisRow.seq < oldest_kept))
