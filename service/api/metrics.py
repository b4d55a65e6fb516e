"""/v1/jobs/{id}/metrics: steps as rows."""

from typing import Annotated, Any

from fastapi import APIRouter, Query

from megatron_ray.config.problem import Problem
from service.api.models import Page
from service.http.dependencies import Service
from service.http.errors import ProblemError
from service.jobs import lifecycle
from service.store import metrics

MOST_ROWS = 10_000
DEFAULT_KEYS = ("loss", "grad_norm", "lr", "tokens_per_s")
router = APIRouter(prefix="/v1", tags=["history"])


@router.get("/jobs/{job_id}/metrics")
def list_metrics(
    job_id: str,
    service: Service,
    keys: Annotated[
        str | None,
        Query(description=f"Columns, separated by commas: {', '.join(metrics.KEYS)}."),
    ] = None,
    from_step: Annotated[int, Query(ge=0, lt=1 << 62)] = 0,
    max_points: Annotated[
        int | None,
        Query(ge=2, le=MOST_ROWS, description="Thin out; first, last and extremes stay."),
    ] = None,
    attempt: Annotated[
        int | None,
        Query(
            ge=1, lt=1 << 31, description="One attempt's rows; else each step's highest."
        ),
    ] = None,
) -> Page[dict[str, Any]]:
    """Rows {step, attempt, <keys>} by step.

    Without `max_points` a long series comes in pages: go on with from_step = last step
    + 1.
    """
    columns = _columns(keys)
    with service.store.read() as session:
        job = lifecycle.find(session, job_id)
        if max_points is not None:
            rows = metrics.read_thinned(
                session, job, columns, max_points, from_step=from_step, attempt=attempt
            )
            more = False
        else:
            rows = metrics.read(
                session,
                job,
                columns,
                from_step=from_step,
                attempt=attempt,
                limit=MOST_ROWS + 1,
            )
            rows, more = rows[:MOST_ROWS], len(rows) > MOST_ROWS
    first, last = (str(rows[0]["step"]), str(rows[-1]["step"])) if rows else (None, None)
    return Page(data=rows, first_id=first, last_id=last, has_more=more)


def _columns(keys: str | None) -> tuple[str, ...]:
    if keys is None:
        return DEFAULT_KEYS
    given = tuple(
        dict.fromkeys(
            name
            for name in (part.strip() for part in keys.split(","))
            if name not in ("", "step", "attempt")
        )
    )
    wrong = [name for name in given if name not in metrics.KEYS]
    if wrong:
        detail = f"key {wrong[0][:80]!r} is unknown; known: {', '.join(metrics.KEYS)}"
        raise ProblemError(
            "request_invalid",
            detail,
            errors=[Problem("/query/keys", "unknown_key", detail)],
        )
    return given
