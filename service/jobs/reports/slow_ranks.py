"""Reads which ranks of an attempt are slow now, from the events of its driver.

Must not know: HTTP, how ranks are compared.
"""

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from service.store.schema import EventRow, JobRow
from workers.protocol.events import EventType

_TYPES = (EventType.RANK_SLOW, EventType.RANK_RECOVERED)
_MAX_EVENTS = 5000


@dataclass(frozen=True)
class SlowRank:
    """A rank whose own work takes longer than that of its peers."""

    ratio: float | None
    """Its own seconds per step over the median of its pipeline stage."""
    since: float
    """Seconds since the epoch."""


def of_attempt(session: Session, job: JobRow, attempt: int) -> dict[int, SlowRank]:
    """Returns the ranks that have become slow in an attempt and not recovered, by rank."""
    statement = (
        sa.select(EventRow)
        .where(
            EventRow.job == job.number,
            EventRow.attempt == attempt,
            EventRow.type.in_(_TYPES),
        )
        .order_by(EventRow.seq.desc())
        .limit(_MAX_EVENTS)
    )
    slow: dict[int, SlowRank] = {}
    # Oldest first, so that the newest event of a rank decides.
    for event in reversed(session.scalars(statement).all()):
        for rank in event.ranks:
            if event.type == EventType.RANK_SLOW:
                slow[rank] = SlowRank(_number(event.data.get("ratio")), event.created_at)
            else:
                slow.pop(rank, None)
    return slow


def _number(value: Any) -> float | None:
    if isinstance(value, int | float):
        return float(value)
    return None
