"""Serves /v1/jobs/{id}/metrics: what a job has measured, by step."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query
from fastapi.responses import JSONResponse, Response
from pydantic import AfterValidator, BeforeValidator, Field

from service.api import render
from service.api.models import JobId, MetricsRow, Page
from service.http.dependencies import ContextDep
from service.http.parameters import WRITTEN_NUMBER, check_query, split_commas
from service.jobs import lifecycle
from service.store import series as store
from service.store.schema import AttemptRow
from service.store.series import Series

MAX_ROWS = 10_000
DEFAULT_KEYS = ("loss", "grad_norm", "lr", "tokens_per_s")
_ALWAYS_PRESENT = ("step", "attempt")
_KEYS_WITH_PARTS = ", ".join(f"{name}/NAME" for name in store.WITH_PARTS)
_KEY_SCHEMA = {
    "anyOf": [
        {"enum": [*store.NAMES, *_ALWAYS_PRESENT]},
        {"pattern": f"^({'|'.join(store.WITH_PARTS)})/[^,\\s]+$"},
    ]
}
router = APIRouter(prefix="/v1", tags=["history"], dependencies=[Depends(check_query)])


def _known_key(name: str) -> str:
    if name not in _ALWAYS_PRESENT and store.parse_series(name) is None:
        known = ", ".join(store.NAMES)
        raise ValueError(f"must be one of {known}, and parts of some: {_KEYS_WITH_PARTS}")
    return name


Key = Annotated[str, AfterValidator(_known_key), Field(json_schema_extra=_KEY_SCHEMA)]


@router.get("/jobs/{job_id}/metrics", response_model=Page[MetricsRow])
def list_metrics(
    job_id: JobId,
    context: ContextDep,
    keys: Annotated[
        list[Key] | None,
        BeforeValidator(split_commas),
        Query(
            description=f"Metrics to return; may be repeated. {_KEYS_WITH_PARTS} are parts of "
            f"some, such as val_loss/SOURCE. Default: {', '.join(DEFAULT_KEYS)}."
        ),
    ] = None,
    from_step: Annotated[
        int,
        Field(ge=0, lt=1 << 62),
        WRITTEN_NUMBER,
        Query(description="First step to return."),
    ] = 0,
    max_points: Annotated[
        int | None,
        Field(ge=2, le=MAX_ROWS),
        WRITTEN_NUMBER,
        Query(
            description="Largest number of rows. The first row, the last one and the "
            "extremes are kept. Default: no thinning.",
        ),
    ] = None,
    attempt: Annotated[
        int | None,
        Field(ge=1, lt=1 << 31),
        WRITTEN_NUMBER,
        Query(
            description="Attempt whose rows to return. Default: for each step the highest "
            "attempt that has it.",
        ),
    ] = None,
) -> Response:
    """Lists the metrics of each step, in order of step.

    `val_loss` is null in steps after which nothing was evaluated, `monitors` in steps in
    which no callback was due; asked for alone, they have rows of the other steps only.
    Without `max_points`, a long series comes in pages. For the next page, set `from_step` to
    the last step plus 1. With `max_points` there is one page; `total` is the number of rows
    that it was thinned from.
    """
    series = _series(keys)
    has_more = False
    total = None
    with context.store.read() as session:
        job = lifecycle.find(session, job_id)
        if attempt is not None and not session.get(AttemptRow, (job.number, attempt)):
            raise render.no_attempt(attempt, job.attempt)
        # A thinned series has a single page, because thinning compares all points.
        if max_points is not None:
            rows, total = store.read_thinned(
                session, job, series, max_points, from_step=from_step, attempt=attempt
            )
        else:
            # One row more than a page, to know whether there is another page.
            limit = MAX_ROWS + 1
            rows = store.read(
                session, job, series, from_step=from_step, attempt=attempt, limit=limit
            )
            has_more = len(rows) > MAX_ROWS
            rows = rows[:MAX_ROWS]
    # As stored: there may be thousands, which need no validation.
    page = render.page(rows, lambda row: row["step"], has_more=has_more, total=total)
    return JSONResponse(page.model_dump())


def _series(keys: list[str] | None) -> list[Series]:
    parsed: list[Series] = []
    for name in dict.fromkeys(keys or DEFAULT_KEYS):
        series = store.parse_series(name)
        # Every row has its step and attempt, so they are no series.
        if series is not None:
            parsed.append(series)
    return parsed
