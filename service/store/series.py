"""Reads what a job has measured over its steps, by name.

Owns: the names of series and their rows. Must not know: HTTP, jobs' states.

A series is a metric of each step, `val_loss` after the evaluated steps, `monitors` of the
steps in which callbacks were due, or one part of a metric that has parts: `val_loss/NAME` of
a source, `split_s/data`, `other_losses/NAME`, `monitors/NAME`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from service.store import evaluations, metrics, monitors
from service.store.schema import JobRow

VALIDATION_LOSS = "val_loss"
MONITORS = "monitors"
SPARSE = (VALIDATION_LOSS, MONITORS)
"""Names of series that have values in some steps only."""
NAMES = (*metrics.KEYS, *SPARSE)
"""Names of all series, without those of parts."""
_MAPPINGS = (*metrics.MAPPING_KEYS, MONITORS)
WITH_PARTS = (*metrics.MAPPING_KEYS, *SPARSE)
Row = dict[str, Any]


@dataclass(frozen=True)
class Series:
    """The series that a name stands for."""

    name: str
    metric: str
    part: str | None = None

    @property
    def is_sparse(self) -> bool:
        """Whether it has values in some steps only."""
        return self.metric in SPARSE


@dataclass(frozen=True)
class _SparseStep:
    """Values of sparse series in one step, by their names."""

    step: int
    attempt: int
    values: Row


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

    Steps without a value have rows too, unless all series are sparse.
    """
    columns = _columns(series)
    rows: dict[int, Row] = {}
    if columns:
        for values in metrics.read(
            session, job, columns, from_step=from_step, attempt=attempt, limit=limit
        ):
            rows[values["step"]] = _step_row(series, values)
    last_step = None
    if limit is not None and len(rows) == limit:
        # Later ones belong to the next page.
        last_step = max(rows)
    for sparse in _sparse_steps(session, job, series, from_step, attempt, limit):
        if last_step is None or sparse.step <= last_step:
            _add_sparse(rows, series, sparse)
    return [rows[step] for step in sorted(rows)][:limit]


def _sparse_steps(
    session: Session,
    job: JobRow,
    series: Sequence[Series],
    from_step: int,
    attempt: int | None,
    limit: int | None,
) -> Iterator[_SparseStep]:
    """Yields the steps in which sparse series have values."""
    losses = [one for one in series if one.metric == VALIDATION_LOSS]
    if losses:
        for evaluated in evaluations.read(
            session, job, from_step=from_step, attempt=attempt, limit=limit
        ):
            values = _values(losses, evaluated.loss, evaluated.source_losses)
            yield _SparseStep(evaluated.step, evaluated.attempt, values)
    monitored = [one for one in series if one.metric == MONITORS]
    if monitored:
        # All numbers are read only if all are asked for.
        names: list[str] | None = [one.part for one in monitored if one.part is not None]
        if any(one.part is None for one in monitored):
            names = None
        for measured in monitors.read(
            session, job, names, from_step=from_step, attempt=attempt, limit=limit
        ):
            values = _values(monitored, measured.numbers, measured.numbers)
            yield _SparseStep(measured.step, measured.attempt, values)


def _values(series: Sequence[Series], whole: Any, parts: Mapping[str, Any]) -> Row:
    """Returns the values of series of one metric, by their names."""
    values: Row = {}
    for one in series:
        values[one.name] = whole
        if one.part is not None:
            values[one.name] = parts.get(one.part)
    return values


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
    if not any(one.is_sparse or one.part for one in series):
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
    names = [one.name for one in series if one.part or one.metric not in _MAPPINGS]
    points = [[row[name] for name in names] for row in rows]
    kept = [rows[index] for index in metrics.thin(points, max_points)]
    return kept, len(rows)


def _columns(series: Sequence[Series]) -> list[str]:
    columns = dict.fromkeys(one.metric for one in series if not one.is_sparse)
    return list(columns)


def _step_row(series: Sequence[Series], values: Row) -> Row:
    row: Row = {"step": values["step"], "attempt": values["attempt"]}
    for one in series:
        value = values.get(one.metric)
        if one.part is not None:
            value = (value or {}).get(one.part)
        row[one.name] = value
    return row


def _add_sparse(
    rows: dict[int, Row], series: Sequence[Series], sparse: _SparseStep
) -> None:
    """Adds the values of a step to its row, or as a further row."""
    step = sparse.step
    if step not in rows:
        rows[step] = _step_row(series, {"step": step, "attempt": sparse.attempt})
    # Otherwise a newer attempt has taken the step, and has no value yet.
    if rows[step]["attempt"] == sparse.attempt:
        rows[step].update(sparse.values)
