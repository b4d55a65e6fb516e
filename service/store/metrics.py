"""Rows of steps.

Owns: storing, reading, thinning them out. Must not know: HTTP, jobs' states.

A row is there once per (job, attempt, step). After a resume steps repeat: the highest
attempt of a step is the one shown.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any

import sqlalchemy as sa
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session, aliased

from service.store.database import Store
from service.store.schema import JobRow, MetricRow


def _finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None


Finite = Annotated[float | None, AfterValidator(_finite)]
"""JSON and SQL have no NaN: a value that is not finite is stored as nothing."""


class StepRow(BaseModel):
    """A StepReport as it arrives: `step` must be there, fields not known here are
    ignored.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)
    step: int = Field(ge=0, lt=1 << 62)
    loss: Finite = None
    grad_norm: Finite = None
    lr: Finite = None
    num_tokens: int | None = None
    consumed_samples: int | None = None
    step_s: Finite = None
    tokens_per_s: Finite = None
    mfu: Finite = None
    memory_bytes: int | None = None
    split_s: dict[str, Finite] | None = None
    other_losses: dict[str, Finite] | None = None


_MAPPINGS = ("split_s", "other_losses")
"""Columns that are no single number, so that nothing is thinned out by them."""
KEYS = tuple(name for name in StepRow.model_fields if name != "step")
_TABLE = MetricRow.__table__
assert isinstance(_TABLE, sa.Table)
_COLUMNS = {name: getattr(MetricRow, name) for name in ("step", "attempt", "cursor", *KEYS)}


def insert(
    store: Store, session: Session, job: JobRow, rows: Sequence[tuple[int, StepRow]]
) -> int:
    """Stores (attempt, row) pairs that are new; returns how many were.

    Gives each its cursor, so the job must be locked.
    """
    first = job.metrics_cursor + 1
    values = [
        {"job": job.number, "attempt": attempt, "cursor": first + i, **row.model_dump()}
        for i, (attempt, row) in enumerate(rows)
    ]
    job.metrics_cursor += len(values)
    assert isinstance(_TABLE, sa.Table)
    return store.insert_or_ignore(session, _TABLE, values)


def read(
    session: Session,
    job: JobRow,
    keys: Sequence[str],
    *,
    from_step: int = 0,
    attempt: int | None = None,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Rows {step, attempt, <keys>} in order of step."""
    statement = _select(job, keys, from_step, attempt)
    return [dict(row) for row in session.execute(statement.limit(limit)).mappings()]


def read_thinned(
    session: Session,
    job: JobRow,
    keys: Sequence[str],
    max_points: int,
    *,
    from_step: int = 0,
    attempt: int | None = None,
) -> list[dict[str, Any]]:
    """At most `max_points` of the rows `read` would give: first, last and every key's
    extremes are among them.
    """
    numbers = [key for key in keys if key not in _MAPPINGS]
    points = session.execute(_select(job, numbers, from_step, attempt)).all()
    kept = [
        points[index] for index in thin([tuple(point[2:]) for point in points], max_points)
    ]
    if len(numbers) == len(keys):
        return [dict(point._mapping) for point in kept]
    found: list[dict[str, Any]] = []
    for start in range(0, len(kept), 500):
        chosen = sa.tuple_(MetricRow.step, MetricRow.attempt).in_(
            [(point[0], point[1]) for point in kept[start : start + 500]]
        )
        found += [
            dict(row)
            for row in session.execute(
                _select(job, keys, from_step, attempt).where(chosen)
            ).mappings()
        ]
    return found


def after(session: Session, job: JobRow, cursor: int, limit: int) -> list[dict[str, Any]]:
    """Whole rows stored after a cursor, in the order of storing, `cursor` included in
    each.
    """
    statement = sa.select(*_COLUMNS.values()).where(
        MetricRow.job == job.number, MetricRow.cursor > cursor
    )
    return [
        dict(row)
        for row in session.execute(
            statement.order_by(MetricRow.cursor).limit(limit)
        ).mappings()
    ]


def thin(points: Sequence[Sequence[float | None]], max_points: int) -> list[int]:
    """Indices of at most `max_points` points (at least 2), ascending: first, last, and
    per stretch each column's extremes.

    The whole series' extremes are extremes of their stretch, hence kept, unless there
    are fewer than two places per column.
    """
    if len(points) <= max_points:
        return list(range(len(points)))
    last = len(points) - 1
    columns = max(1, len(points[0]))
    stretches = max(1, (max_points - 2) // (2 * columns))
    kept = [0, last]
    for stretch in range(stretches):
        part = range(
            1 + (last - 1) * stretch // stretches,
            1 + (last - 1) * (stretch + 1) // stretches,
        )
        for column in range(len(points[0])):
            known = [
                (value, index)
                for index in part
                if (value := points[index][column]) is not None
            ]
            kept += [min(known)[1], max(known)[1]] if known else []
        if not points[0] and part:
            kept.append(part[0])
    return sorted(list(dict.fromkeys(kept))[:max_points])


def _select(
    job: JobRow, keys: Sequence[str], from_step: int, attempt: int | None
) -> sa.Select[Any]:
    columns = [MetricRow.step, MetricRow.attempt, *(_COLUMNS[key] for key in keys)]
    statement = (
        sa.select(*columns)
        .where(MetricRow.job == job.number, MetricRow.step >= from_step)
        .order_by(MetricRow.step)
    )
    if attempt is not None:
        return statement.where(MetricRow.attempt == attempt)
    if job.attempt <= 1:
        return statement
    other = aliased(MetricRow)
    highest = (
        sa.select(sa.func.max(other.attempt))
        .where(other.job == MetricRow.job, other.step == MetricRow.step)
        .scalar_subquery()
    )
    return statement.where(MetricRow.attempt == highest)
