"""Stores and reads the metrics of training steps.

Owns: the rows of steps, and thinning them out. Must not know: HTTP, jobs' states.

There is one row per (job, attempt, step). After a resume steps repeat: readers are shown
the highest attempt of each step.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import sqlalchemy as sa
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model
from sqlalchemy.orm import InstrumentedAttribute, Session, aliased

from megatron_ray.reports import StepReport
from service.store.database import Store
from service.store.schema import JobRow, MetricRow

_FIELD_TYPES = {field.name: field.type for field in dataclasses.fields(StepReport)}
KEYS = tuple([name for name in _FIELD_TYPES if name != "step"])
"""Names of the metrics of a step: StepReport's fields, and columns of MetricRow."""
MAPPING_KEYS = tuple([name for name in KEYS if _FIELD_TYPES[name] == dict[str, float]])
"""Those whose value is a mapping: the metric has parts."""
MAX_ROWS_PER_QUERY = 500
"""Rows that one query may name: databases limit the parameters of a statement."""


def _finite_or_none(value: float | None) -> float | None:
    if value is None or math.isfinite(value):
        return value
    return None


Finite = Annotated[float | None, AfterValidator(_finite_or_none)]
"""A number or nothing: JSON and SQL have no NaN, so it is stored as nothing."""

# How a driver's value is read, by the type of StepReport's field. All may be missing: a
# driver may be older or newer than the service.
_READ_AS: Mapping[Any, Any] = {
    int: int | None,
    float: Finite,
    float | None: Finite,
    dict[str, float]: dict[str, Finite] | None,
}


class _StepBase(BaseModel):
    """The part of a StepReport that must be there."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    step: int = Field(ge=0, lt=1 << 62)


_DEFINITIONS: dict[str, Any] = {key: (_READ_AS[_FIELD_TYPES[key]], None) for key in KEYS}
_StepData = create_model("_StepData", __base__=_StepBase, **_DEFINITIONS)


@dataclass(frozen=True)
class StepRow:
    """The metrics of one step."""

    step: int
    values: dict[str, Any]
    """Values by KEYS; None where the driver sent nothing."""


def parse_step(data: Mapping[str, Any]) -> StepRow:
    """Reads a StepReport as a driver sends it.

    Raises pydantic's ValidationError when the step is missing or a value has a wrong type.
    """
    parsed = _StepData.model_validate(data)
    values = parsed.model_dump(exclude={"step"})
    # Drivers send 0 where the device's peak is not known: no share, rather than none of it.
    values["mfu"] = values["mfu"] or None
    return StepRow(parsed.step, values)


def insert(
    store: Store, session: Session, job: JobRow, rows: Iterable[tuple[int, StepRow]]
) -> int:
    """Stores (attempt, row) pairs that are new; returns how many were.

    The job must be locked: its counter gives each row its cursor.
    """
    values = []
    for attempt, row in rows:
        # Rows that are stored already use up a cursor too; a gap there is harmless.
        job.metrics_cursor += 1
        values.append(
            {
                "job": job.number,
                "step": row.step,
                "attempt": attempt,
                "cursor": job.metrics_cursor,
                **row.values,
            }
        )
    table = MetricRow.__table__
    assert isinstance(table, sa.Table)
    return store.insert_or_ignore(session, table, values)


def read(
    session: Session,
    job: JobRow,
    keys: Sequence[str],
    *,
    from_step: int = 0,
    attempt: int | None = None,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Returns rows {step, attempt, <keys>} in order of step."""
    statement = _select(job, keys, from_step, attempt)
    return _as_dicts(session, statement.limit(limit))


def read_thinned(
    session: Session,
    job: JobRow,
    keys: Sequence[str],
    max_points: int,
    *,
    from_step: int = 0,
    attempt: int | None = None,
) -> tuple[list[dict[str, Any]], int]:
    """Returns at most `max_points` of the rows that `read` would return, and their number.

    The first row, the last one and every key's extremes are among them.
    """
    # Mappings have no extremes, and are large: they are read for the kept rows only.
    number_keys = [key for key in keys if key not in MAPPING_KEYS]
    # All numbers are read, because extremes need all values of a stretch.
    points = session.execute(_select(job, number_keys, from_step, attempt)).all()
    # The first two columns are step and attempt.
    kept = thin([tuple(point[2:]) for point in points], max_points)
    rows: list[dict[str, Any]] = []
    if len(number_keys) == len(keys):
        for index in kept:
            rows.append(dict(points[index]._mapping))
        return rows, len(points)
    step_and_attempt = sa.tuple_(MetricRow.step, MetricRow.attempt)
    for start in range(0, len(kept), MAX_ROWS_PER_QUERY):
        part = kept[start : start + MAX_ROWS_PER_QUERY]
        is_kept = step_and_attempt.in_([tuple(points[index][:2]) for index in part])
        rows += _as_dicts(session, _select(job, keys, from_step, attempt).where(is_kept))
    return rows, len(points)


def after(session: Session, job: JobRow, cursor: int, limit: int) -> list[dict[str, Any]]:
    """Returns whole rows stored after a cursor, in the order of storing.

    Each row contains its own `cursor`.
    """
    statement = (
        sa.select(*_columns("step", "attempt", "cursor", *KEYS))
        .where(MetricRow.job == job.number, MetricRow.cursor > cursor)
        .order_by(MetricRow.cursor)
        .limit(limit)
    )
    return _as_dicts(session, statement)


def thin(points: Sequence[Sequence[float | None]], max_points: int) -> list[int]:
    """Returns ascending indices of at most `max_points` points (at least 2).

    Among them are the first, the last, and the extremes of each column in each of several
    equal stretches. The extremes of the whole series are extremes of their stretch and
    hence kept, unless there are fewer than two places per column.
    """
    if len(points) <= max_points:
        return list(range(len(points)))
    last = len(points) - 1
    num_columns = len(points[0])
    num_stretches = max(1, (max_points - 2) // (2 * max(1, num_columns)))
    kept = [0, last]
    for stretch in range(num_stretches):
        # The points between first and last, divided as evenly as integers allow.
        start = 1 + (last - 1) * stretch // num_stretches
        end = 1 + (last - 1) * (stretch + 1) // num_stretches
        for column in range(num_columns):
            kept += _extremes(points, range(start, end), column)
        if num_columns == 0 and start < end:
            kept.append(start)
    # Truncated before sorting, because first and last are at the front and must be kept.
    # One point may be the extreme of several columns.
    unique = list(dict.fromkeys(kept))
    return sorted(unique[:max_points])


def _extremes(
    points: Sequence[Sequence[float | None]], stretch: range, column: int
) -> list[int]:
    """Returns the indices of a column's least and greatest value in a stretch."""
    candidates = []
    for index in stretch:
        value = points[index][column]
        if value is not None:
            candidates.append((value, index))
    if not candidates:
        return []
    return [min(candidates)[1], max(candidates)[1]]


def _select(
    job: JobRow, keys: Sequence[str], from_step: int, attempt: int | None
) -> sa.Select[Any]:
    statement = (
        sa.select(*_columns("step", "attempt", *keys))
        .where(MetricRow.job == job.number, MetricRow.step >= from_step)
        .order_by(MetricRow.step)
    )
    if attempt is not None:
        return statement.where(MetricRow.attempt == attempt)
    if job.attempt <= 1:
        # No step can have two attempts, and the subquery below costs a lookup a row.
        return statement
    other = aliased(MetricRow)
    highest = (
        sa.select(sa.func.max(other.attempt))
        .where(other.job == MetricRow.job, other.step == MetricRow.step)
        .scalar_subquery()
    )
    return statement.where(MetricRow.attempt == highest)


def _columns(*names: str) -> list[InstrumentedAttribute[Any]]:
    return [getattr(MetricRow, name) for name in names]


def _as_dicts(session: Session, statement: sa.Select[Any]) -> list[dict[str, Any]]:
    return [dict(row) for row in session.execute(statement).mappings()]
