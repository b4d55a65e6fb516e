"""Serves /v1/jobs/{id}/logs: what a rank wrote to stdout and stderr."""

from functools import partial
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Depends, Query
from pydantic import Field
from starlette.concurrency import run_in_threadpool

from service.api import render
from service.api.models import JobId, Log
from service.exceptions import NotFoundError
from service.http.dependencies import Context, ContextDep
from service.http.parameters import WRITTEN_NUMBER, check_query
from service.jobs import lifecycle
from service.store.schema import AttemptRow, JobRow
from workers.protocol.states import JobState

if TYPE_CHECKING:
    from service.jobs.logs import LogPart

router = APIRouter(prefix="/v1", tags=["history"], dependencies=[Depends(check_query)])


@router.get("/jobs/{job_id}/logs")
async def read_log(
    job_id: JobId,
    context: ContextDep,
    rank: Annotated[
        int, Field(ge=0, lt=100_000), WRITTEN_NUMBER, Query(description="Rank.")
    ] = 0,
    attempt: Annotated[
        int | None,
        Field(ge=1, le=9999),
        WRITTEN_NUMBER,
        Query(description="Attempt. Default: newest."),
    ] = None,
    offset: Annotated[
        int,
        Field(ge=0, lt=1 << 62),
        WRITTEN_NUMBER,
        Query(description="Byte of the file to start at."),
    ] = 0,
    limit: Annotated[
        int,
        Field(ge=4, le=1 << 20),
        WRITTEN_NUMBER,
        Query(description="Largest number of bytes to return."),
    ] = 1 << 16,
) -> Log:
    """Reads a part of a rank's log, starting at `offset`.

    Pass `next_offset` as the next `offset` to continue. `data` is empty while the rank
    has not written anything.
    """
    job, number = await run_in_threadpool(_find, context, job_id, attempt, rank)
    read = partial(_read_part, job.job_dir, number, rank, offset, limit)
    part = await context.storage_reads.run(job.job_dir, read)
    return Log(
        rank=rank,
        attempt=number,
        offset=offset,
        next_offset=part.next_offset,
        size=part.size,
        data=part.text,
    )


def _find(
    context: Context, job_id: str, attempt: int | None, rank: int
) -> tuple[JobRow, int]:
    """Returns the job and the number of the attempt whose log is read."""
    with context.store.read() as session:
        job = lifecycle.find(session, job_id)
        number = attempt or job.attempt
        row = session.get(AttemptRow, (job.number, number))
    _check_exists(job, row, number, rank)
    return job, number


def _read_part(job_dir: str, attempt: int, rank: int, offset: int, limit: int) -> "LogPart":
    # Imported here: pyarrow takes a fifth of the service's start, and only logs need it.
    from service.jobs import logs

    return logs.read_log(job_dir, attempt, rank, offset, limit)


def _check_exists(job: JobRow, row: AttemptRow | None, attempt: int, rank: int) -> None:
    # An error instead of an empty log, which would look like a rank that hangs.
    if job.attempt == 0:
        when = "has had no attempt"
        if not JobState(job.status).is_terminal:
            when = "has no attempt yet"
        raise NotFoundError(
            f"job {job.id} {when}, so there are no logs; the job is {job.status}"
        )
    if attempt > job.attempt:
        raise render.no_attempt(attempt, job.attempt)
    world_size = job.world_size
    # An attempt may have had another world size than the job was submitted with.
    if row is not None and row.world_size is not None:
        world_size = row.world_size
    if world_size is not None and rank >= world_size:
        raise NotFoundError.of_field(
            "/query/rank",
            "no_rank",
            f"no rank {rank}; attempt {attempt} has ranks 0 to {world_size - 1}",
        )
