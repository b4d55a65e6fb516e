"""Serves /v1/jobs/{id}/checkpoints, /attempts and /ranks."""

from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Depends, Query
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from service.api import render
from service.api.models import Attempt, Checkpoint, JobId, Page, RankPlacement
from service.http.dependencies import ContextDep
from service.http.parameters import WRITTEN_NUMBER, check_query
from service.jobs import lifecycle
from service.jobs.reports import slow_ranks
from service.jobs.reports.slow_ranks import SlowRank
from service.store.schema import AttemptRow, CheckpointRow
from workers.protocol.states import JobState

router = APIRouter(prefix="/v1", tags=["history"], dependencies=[Depends(check_query)])


@router.get("/jobs/{job_id}/checkpoints")
def list_checkpoints(job_id: JobId, context: ContextDep) -> Page[Checkpoint]:
    """Lists committed checkpoints that still exist, oldest first."""
    with context.store.read() as session:
        job = lifecycle.find(session, job_id)
        statement = (
            sa.select(CheckpointRow)
            .where(CheckpointRow.job == job.number, CheckpointRow.deleted_at.is_(None))
            # After a resume two attempts may have written a checkpoint of the same step.
            .order_by(CheckpointRow.step, CheckpointRow.attempt)
        )
        checkpoints = [render.checkpoint(row) for row in session.scalars(statement)]
    return render.page(
        checkpoints, lambda checkpoint: checkpoint.path, total=len(checkpoints)
    )


@router.get("/jobs/{job_id}/attempts")
def list_attempts(job_id: JobId, context: ContextDep) -> Page[Attempt]:
    """Lists a job's attempts, oldest first."""
    with context.store.read() as session:
        job = lifecycle.find(session, job_id)
        statement = (
            sa.select(AttemptRow)
            .where(AttemptRow.job == job.number)
            .order_by(AttemptRow.attempt)
        )
        attempts = [render.attempt(row) for row in session.scalars(statement)]
    return render.page(attempts, lambda attempt: attempt.attempt, total=len(attempts))


@router.get("/jobs/{job_id}/ranks", response_model=Page[RankPlacement])
def list_ranks(
    job_id: JobId,
    context: ContextDep,
    attempt: Annotated[
        int | None,
        Field(ge=1, lt=1 << 31),
        WRITTEN_NUMBER,
        Query(description="Attempt. Default: newest."),
    ] = None,
) -> Response:
    """Lists where each rank runs, and which are slower than their peers.

    The list is empty before the ranks are placed.
    """
    with context.store.read() as session:
        job = lifecycle.find(session, job_id)
        # Attempt 0 does not exist: before the first one the row is None.
        row = session.get(AttemptRow, (job.number, attempt or job.attempt))
        slow: dict[int, SlowRank] = {}
        if row is not None:
            slow = slow_ranks.of_attempt(session, job, row.attempt)
        dashboard_url = None
        # The files are deleted at the job's end.
        if not JobState(job.status).is_terminal:
            dashboard_url = render.dashboard_url(session, job.cluster)
    ranks: list[dict[str, Any]] = []
    if row is not None:
        ranks = render.ranks(row.ranks, slow)
        if dashboard_url is not None:
            ranks = render.with_log_urls(ranks, dashboard_url, job_id, row.attempt)
    elif attempt is not None:
        # Without a number the newest is meant, which may not be placed yet: no error.
        raise render.no_attempt(attempt, job.attempt)
    # As stored: there may be thousands, which need no validation.
    page = render.page(ranks, lambda rank: rank.get("rank"), total=len(ranks))
    return JSONResponse(page.model_dump())
