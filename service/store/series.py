"""Reads what a job has measured over its steps, by name.

Owns: the names of series and their rows. Must not know: HTTP, jobs' states.

A series is a metric of each step, `val_loss` after the evaluated steps, or one part of a
metric that has parts: `val_loss/NAME` of a source, `split_s/data`, `other_losses/NAME`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from service.store import evaluations, metrics
from service.store.evaluations import EvaluatedStep
from service.store.schema import JobRow

VALIDATION_LOSS = "val_loss"
NAMES = (*metrics.KEYS, VALIDATION_LOSS)
"""Names of all series, without those of parts."""
WITH_PARTS = (*metrics.MAPPING_KEYS, VALIDATION_LOSS)
Row = dict[str, Any]


@dataclass(frozen=True)
class Series:
    """The series that a name stands for."""

    name: str
    metric: str
    part: str | None = None

    @property
    def is_validation(self) -> bool:
        """Whether it has values after evaluated steps only."""
        return self.metric == VALIDATION_LOSS


def parse_series(name: str) -> Series | None:
    """Returns the series of a name; None for an unknown name."""
    metric, has_part, part = name.partition("/")
    if not has_part and metric in NAMES:
        return Series(name, metric)
    if part and metric in WITH_PARTS:
        return Series(name, metric, part)
    return None


def read(
    session: Session,
    job: JobRow,
    series: Sequence[Series],
    *,
    from_step: int = 0,
    attempt: int | None = None,
    limit: int | None = None,
) -> list[Row]:
    """Returns rows {step, attempt, <names>} in order of step.

    Steps that were not evaluated have rows too, unless all series are of the validation
    loss.
    """
    columns = _columns(series)
    rows: dict[int, Row] = {}
    if columns:
        for values in metrics.read(
            session, job, columns, from_step=from_step, attempt=attempt, limit=limit
        ):
            rows[values["step"]] = _step_row(series, values)
    if any(one.is_validation for one in series):
        evaluated = evaluations.read(
            session, job, from_step=from_step, attempt=attempt, limit=limit
        )
        last_step = None
        if limit is not None and len(rows) == limit:
            # Later ones belong to the next page.
            last_step = max(rows)
        _add_evaluations(rows, series, evaluated, last_step)
    return [rows[step] for step in sorted(rows)][:limit]


def read_thinned(
    session: Session,
    job: JobRow,
    series: Sequence[Series],
    max_points: int,
    *,
    from_step: int = 0,
    attempt: int | None = None,
) -> tuple[list[Row], int]:
    """Returns at most `max_points` of the rows that `read` would return, and their number.

    The first row, the last one and every series' extremes are among them.
    """
    if not any(one.is_validation or one.part for one in series):
        return metrics.read_thinned(
            session,
            job,
            _columns(series),
            max_points,
            from_step=from_step,
            attempt=attempt,
        )
    rows = read(session, job, series, from_step=from_step, attempt=attempt)
    # Mappings have no extremes.
    names = [
        one.name for one in series if one.part or one.metric not in metrics.MAPPING_KEYS
    ]
    points = [[row[name] for name in names] for row in rows]
    kept = [rows[index] for index in metrics.thin(points, max_points)]
    return kept, len(rows)


def _columns(series: Sequence[Series]) -> list[str]:
    columns = dict.fromkeys(one.metric for one in series if not one.is_validation)
    return list(columns)


def _step_row(series: Sequence[Series], values: Row) -> Row:
    row: Row = {"step": values["step"], "attempt": values["attempt"]}
    for one in series:
        value = values.get(one.metric)
        if one.part is not None:
            value = (value or {}).get(one.part)
        row[one.name] = value
    return row


def _add_evaluations(
    rows: dict[int, Row],
    series: Sequence[Series],
    evaluated: Sequence[EvaluatedStep],
    last_step: int | None,
) -> None:
    """Adds the losses up to `last_step` to the rows of their steps, or as further rows."""
    for one_step in evaluated:
        step = one_step.step
        if last_step is not None and step > last_step:
            return
        if step not in rows:
            rows[step] = _step_row(series, {"step": step, "attempt": one_step.attempt})
        # A newer attempt has taken the step and not evaluated it yet.
        if rows[step]["attempt"] != one_step.attempt:
            continue
        for one in series:
            if one.is_validation and one.part is None:
                rows[step][one.name] = one_step.loss
            elif one.is_validation:
                rows[step][one.name] = one_step.source_losses.get(one.part or "")
