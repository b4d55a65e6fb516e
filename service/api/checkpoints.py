"""/v1/jobs/{id}/checkpoints, /attempts, /ranks: what a job has left behind and where it
runs.
"""

from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Query

from service.api import render
from service.api.models import Attempt, Checkpoint, Page
from service.http.dependencies import Service
from service.http.errors import ProblemError
from service.jobs import lifecycle
from service.store.schema import AttemptRow, CheckpointRow

router = APIRouter(prefix="/v1", tags=["history"])


@router.get("/jobs/{job_id}/checkpoints")
def list_checkpoints(job_id: str, service: Service) -> Page[Checkpoint]:
    """Committed checkpoints that still exist, oldest first."""
    with service.store.read() as session:
        job = lifecycle.find(session, job_id)
        held = CheckpointRow.job == job.number, CheckpointRow.deleted_at.is_(None)
        rows = session.scalars(
            sa.select(CheckpointRow)
            .where(*held)
            .order_by(CheckpointRow.step, CheckpointRow.attempt)
        )
        found = [render.checkpoint(row) for row in rows]
    return render.page(found, [item.path for item in found], has_more=False)


@router.get("/jobs/{job_id}/attempts")
def list_attempts(job_id: str, service: Service) -> Page[Attempt]:
    """Attempts, oldest first."""
    with service.store.read() as session:
        job = lifecycle.find(session, job_id)
        rows = session.scalars(
            sa.select(AttemptRow)
            .where(AttemptRow.job == job.number)
            .order_by(AttemptRow.attempt)
        )
        found = [render.attempt(row) for row in rows]
    return render.page(found, [str(item.attempt) for item in found], has_more=False)


@router.get("/jobs/{job_id}/ranks")
def list_ranks(
    job_id: str,
    service: Service,
    attempt: Annotated[
        int | None, Query(ge=1, lt=1 << 31, description="The newest when not given.")
    ] = None,
) -> Page[dict[str, Any]]:
    """Which rank runs where: {rank, slot, node_id, address, gpu, pid, coordinates}.

    Empty before placement.
    """
    with service.store.read() as session:
        job = lifecycle.find(session, job_id)
        row = session.get(AttemptRow, (job.number, attempt or job.attempt))
    if row is None and attempt is not None:
        raise ProblemError(
            "not_found",
            f"job {job_id} has had {job.attempt} attempts, not {attempt}; leave attempt "
            "out for the newest",
        )
    ranks = [] if row is None else row.ranks
    return render.page(ranks, [str(rank.get("rank")) for rank in ranks], has_more=False)
