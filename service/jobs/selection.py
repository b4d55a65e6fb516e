"""Chooses jobs by state, name and labels, and cancels many at once.

Works inside the caller's transaction. Must not know: HTTP.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

from service.jobs import lifecycle, queue
from service.store.schema import JobRow, LabelRow
from workers.protocol.states import JobState


@dataclass(frozen=True)
class JobFilter:
    """The jobs that match all that is given."""

    statuses: Sequence[JobState] | None = None
    name: str | None = None
    """Name, in which `*` stands for any characters."""
    labels: Iterable[tuple[str, str]] = ()

    def select(self) -> sa.Select[JobRow]:
        """Returns the statement that selects the jobs, newest first."""
        statement = sa.select(JobRow).where(JobRow.deleted_at.is_(None))
        if self.statuses is not None:
            statement = statement.where(JobRow.status.in_(self.statuses))
        if self.name is not None:
            # Names hold no character that means something to LIKE.
            statement = statement.where(JobRow.name.like(self.name.replace("*", "%")))
        for key, value in self.labels:
            labelled = sa.select(LabelRow.job).where(
                LabelRow.key == key, LabelRow.value == value
            )
            statement = statement.where(JobRow.number.in_(labelled))
        return statement.order_by(JobRow.number.desc())

    def count(self, session: Session) -> int:
        """Returns the number of the jobs."""
        numbers = self.select().with_only_columns(JobRow.number).order_by(None)
        return (
            session.scalar(sa.select(sa.func.count()).select_from(numbers.subquery())) or 0
        )


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
        queue.admit_jobs(session, cluster)
    return Cancelled(tuple(cancelled), tuple(ended))
