"""Serves /v1/jobs/{id}/metrics: what a job has measured, by step."""

from typing import Annotated, Any

from fastapi import APIRouter, Query

from service.api.models import JobId, Page
from service.exceptions import RequestInvalidError
from service.http.dependencies import ContextDep
from service.jobs import lifecycle
from service.store import series as store
from service.store.series import Series

MAX_ROWS = 10_000
DEFAULT_KEYS = ("loss", "grad_norm", "lr", "tokens_per_s")
_KNOWN_KEYS = ", ".join(store.NAMES)
_KEYS_WITH_PARTS = ", ".join(f"{name}/NAME" for name in store.WITH_PARTS)
_ALWAYS_PRESENT = ("", "step", "attempt")
router = APIRouter(prefix="/v1", tags=["history"])


@router.get("/jobs/{job_id}/metrics")
def list_metrics(
    job_id: JobId,
    context: ContextDep,
    keys: Annotated[
        str | None,
        Query(
            description=f"Metrics, separated by commas: {_KNOWN_KEYS}, and parts of some: "
            f"{_KEYS_WITH_PARTS}, such as val_loss/SOURCE. Default: "
            f"{', '.join(DEFAULT_KEYS)}."
        ),
    ] = None,
    from_step: Annotated[
        int, Query(ge=0, lt=1 << 62, description="First step to return.")
    ] = 0,
    max_points: Annotated[
        int | None,
        Query(
            ge=2,
            le=MAX_ROWS,
            description="Largest number of rows. The first row, the last one and the "
            "extremes are kept. Default: no thinning.",
        ),
    ] = None,
    attempt: Annotated[
        int | None,
        Query(
            ge=1,
            lt=1 << 31,
            description="Attempt whose rows to return. Default: for each step the highest "
            "attempt that has it.",
        ),
    ] = None,
) -> Page[dict[str, Any]]:
    """Lists rows {step, attempt, <keys>} in order of step.

    `val_loss` is null in steps after which nothing was evaluated; asked for alone, it has
    rows of evaluated steps only. Without `max_points`, a long series comes in pages. For
    the next page, set `from_step` to the last step plus 1.
    """
    series = _series(keys)
    has_more = False
    with context.store.read() as session:
        job = lifecycle.find(session, job_id)
        # A thinned series has a single page, because thinning compares all points.
        if max_points is not None:
            rows = store.read_thinned(
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
    if not rows:
        return Page(data=[], has_more=False)
    first_id = str(rows[0]["step"])
    last_id = str(rows[-1]["step"])
    return Page(data=rows, first_id=first_id, last_id=last_id, has_more=has_more)


def _series(keys: str | None) -> list[Series]:
    if keys is None:
        keys = ",".join(DEFAULT_KEYS)
    parsed: list[Series] = []
    for part in keys.split(","):
        name = part.strip()
        # Every row contains step and attempt.
        if name in _ALWAYS_PRESENT:
            continue
        series = store.parse_series(name)
        if series is None:
            detail = (
                f"unknown key {name[:80]!r}; known: {_KNOWN_KEYS}, and parts of some: "
                f"{_KEYS_WITH_PARTS}"
            )
            raise RequestInvalidError.of_field("/query/keys", "unknown_key", detail)
        if series not in parsed:
            parsed.append(series)
    return parsed
