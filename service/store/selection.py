"""Selects jobs by state, name and labels.

Must not know: HTTP, what is done with them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

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
