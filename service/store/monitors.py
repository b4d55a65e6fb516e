"""Stores and reads what the callbacks of jobs have measured.

Owns: the rows of monitors. Must not know: HTTP, jobs' states, the names of numbers.

There is one row per (job, step, attempt). After a resume steps repeat: readers are shown
the highest attempt of each step.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session, aliased

from service.store.database import Store
from service.store.metrics import Finite
from service.store.schema import JobRow, MonitorRow

MAX_NUMBERS = 8192
"""Numbers of one record; drivers of this version send a quarter of them at most."""
_Name = Annotated[str, Field(max_length=512)]


class MonitoredNumbers(BaseModel):
    """A MonitorReport as a driver sends it; fields of a newer driver are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    step: int = Field(ge=0, lt=1 << 62)
    numbers: dict[_Name, Finite] = Field(max_length=MAX_NUMBERS)


@dataclass(frozen=True)
class MonitoredStep:
    """What was measured in one step."""

    step: int
    attempt: int
    numbers: Mapping[str, float | None]


def parse_monitors(data: Mapping[str, Any]) -> MonitoredNumbers:
    """Reads a MonitorReport as a driver sends it.

    Raises pydantic's ValidationError when the step or the numbers are missing or wrong.
    """
    return MonitoredNumbers.model_validate(data)


def insert(
    store: Store, session: Session, job: JobRow, attempt: int, monitored: MonitoredNumbers
) -> None:
    """Stores the numbers of a step, unless they are stored already."""
    table = MonitorRow.__table__
    assert isinstance(table, sa.Table)
    values = {"job": job.number, "attempt": attempt, **monitored.model_dump()}
    store.insert_or_ignore(session, table, [values])


def read(
    session: Session,
    job: JobRow,
    names: Sequence[str] | None,
    *,
    from_step: int = 0,
    attempt: int | None = None,
    limit: int | None = None,
) -> list[MonitoredStep]:
    """Returns some numbers, or all with None, in order of step.

    Only the steps that have one of them.
    """
    columns: list[Any] = [MonitorRow.numbers]
    is_there: Any = sa.true()
    if names is not None:
        # The database reads a few of maybe thousands of numbers faster than Python.
        columns = [MonitorRow.numbers[name].as_float() for name in names]
        is_there = sa.or_(*map(_has, names))
    statement = (
        sa.select(MonitorRow.step, MonitorRow.attempt, *columns)
        .where(MonitorRow.job == job.number, MonitorRow.step >= from_step, is_there)
        .order_by(MonitorRow.step)
        .limit(limit)
    )
    steps = []
    for step, own_attempt, *values in session.execute(_of(statement, attempt)):
        numbers: Mapping[str, float | None] = values[0]
        if names is not None:
            numbers = dict(zip(names, values, strict=True))
        steps.append(MonitoredStep(step, own_attempt, numbers))
    return steps


def _has(name: str) -> Any:
    """Returns whether a row has a number, which may be null."""
    # By its text, in which alone databases tell null from nothing in the same way.
    text = sa.cast(MonitorRow.numbers, sa.Text)
    return text.contains(f"{json.dumps(name)}:", autoescape=True)


def _of(statement: sa.Select[Any], attempt: int | None) -> sa.Select[Any]:
    """Returns the rows of an attempt, or of the highest one of each step."""
    if attempt is not None:
        return statement.where(MonitorRow.attempt == attempt)
    other = aliased(MonitorRow)
    highest = (
        sa.select(sa.func.max(other.attempt))
        .where(other.job == MonitorRow.job, other.step == MonitorRow.step)
        .scalar_subquery()
    )
    return statement.where(MonitorRow.attempt == highest)
