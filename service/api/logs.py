"""/v1/jobs/{id}/logs: what a rank wrote to stdout and stderr."""

from typing import Annotated

from fastapi import APIRouter, Query

from service.api.models import Log
from service.http.dependencies import Service
from service.http.errors import ProblemError
from service.jobs import lifecycle
from service.store.schema import AttemptRow, JobRow

router = APIRouter(prefix="/v1", tags=["history"])


@router.get("/jobs/{job_id}/logs")
def read_log(
    job_id: str,
    service: Service,
    rank: Annotated[int, Query(ge=0, lt=100_000)] = 0,
    attempt: Annotated[
        int | None, Query(ge=1, le=9999, description="The newest when not given.")
    ] = None,
    offset: Annotated[int, Query(ge=0, lt=1 << 62)] = 0,
    limit: Annotated[int, Query(ge=4, le=1 << 20, description="Bytes.")] = 1 << 16,
) -> Log:
    """A piece of a log from `offset` on; go on with `next_offset`.

    Empty while the rank has not written anything.
    """
    with service.store.read() as session:
        job = lifecycle.find(session, job_id)
        number = attempt or job.attempt
        row = session.get(AttemptRow, (job.number, number))
    _refuse_unknown(job, row, number, rank)
    from service.jobs import (
        logs,
        # here because pyarrow takes a fifth of the service's start, and only logs need it
    )

    size, data, next_offset = logs.read_log(job.job_dir, number, rank, offset, limit)
    return Log(
        rank=rank,
        attempt=number,
        offset=offset,
        next_offset=next_offset,
        size=size,
        data=data,
    )


def _refuse_unknown(job: JobRow, row: AttemptRow | None, attempt: int, rank: int) -> None:
    if job.attempt == 0:
        raise ProblemError(
            "not_found",
            f"job {job.id} has not had an attempt yet, so there are no logs; its state is "
            f"{job.status}",
        )
    if attempt > job.attempt:
        raise ProblemError(
            "not_found",
            f"job {job.id} has had {job.attempt} attempts, not {attempt}; leave attempt "
            "out for the newest",
        )
    world = (row.world_size if row is not None else None) or job.world_size
    if world is not None and rank >= world:
        raise ProblemError(
            "not_found", f"attempt {attempt} has ranks 0 to {world - 1}, not {rank}"
        )
