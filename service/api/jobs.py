"""Serves /v1/jobs: create, list, show, cancel, pause, resume, checkpoint, delete."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import JSONResponse, Response
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from service.api import render
from service.api.models import (
    CancelRequest,
    Job,
    JobId,
    JobSummary,
    Page,
    PauseRequest,
    ResumeRequest,
)
from service.exceptions import JobActiveError, RequestInvalidError
from service.http.dependencies import Context, ContextDep, CurrentCaller
from service.http.idempotency import IdempotentRequest, StoredResponse
from service.jobs import lifecycle, pausing, queue
from service.jobs.submit import Submitter
from service.store.schema import JobRow, LabelRow
from workers.protocol.job import JobSpec
from workers.protocol.states import JobState, StatusReason

router = APIRouter(prefix="/v1", tags=["jobs"])
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="Makes the request safe to repeat: the same key gets the first response "
        "again. Keys are kept for 7 days.",
    ),
]
_LABEL_PREFIX = "metadata["


@router.post("/jobs", status_code=201, response_model=Job)
async def create_job(
    spec: JobSpec,
    request: Request,
    context: ContextDep,
    caller: CurrentCaller,
    key: IdempotencyKey = None,
) -> Response:
    """Creates a job.

    An invalid spec is refused with all its errors at once, before anything is stored or
    reserved.
    """
    submitted = await request.json()
    repeatable = IdempotentRequest.of(key, caller.token_id, "/v1/jobs", submitted)
    earlier = await run_in_threadpool(_earlier_response, context, repeatable)
    if earlier is not None:
        return _created(earlier, is_replay=True)
    # Stores `submitted` instead of `spec`: the user's input without defaults.
    submitter = Submitter(context.settings, context.store, context.agents)
    job = await submitter.prepare(spec, submitted)
    store = partial(_store_job, context, submitter, spec, job, repeatable)
    response, is_replay = await run_in_threadpool(store)
    if not is_replay:
        context.telemetry.jobs_created.inc()
    return _created(response, is_replay=is_replay)


@router.get("/jobs")
def list_jobs(
    request: Request,
    context: ContextDep,
    limit: Annotated[int, Query(ge=1, le=100, description="Jobs per page.")] = 20,
    after: Annotated[
        str | None, Query(description="Id of the last job of the previous page.")
    ] = None,
    status: Annotated[
        str | None, Query(description="States to list, separated by commas. Default: all.")
    ] = None,
) -> Page[JobSummary]:
    """Lists jobs, newest first.

    `metadata[key]=value` lists only jobs with that label. With several, all must match.
    """
    statement = (
        sa.select(JobRow)
        .where(JobRow.deleted_at.is_(None))
        .order_by(JobRow.number.desc())
        .limit(limit + 1)  # one more, to know whether there is another page
    )
    if status is not None:
        statement = statement.where(JobRow.status.in_(_states(status)))
    # Label names are arbitrary, so they cannot be declared as parameters in FastAPI.
    for name, value in request.query_params.multi_items():
        if name.startswith(_LABEL_PREFIX) and name.endswith("]"):
            label_key = name.removeprefix(_LABEL_PREFIX).removesuffix("]")
            statement = statement.where(JobRow.number.in_(_labelled(label_key, value)))
    with context.store.read() as session:
        # Ordered by number, so that jobs submitted meanwhile do not shift the pages.
        if after is not None:
            statement = statement.where(JobRow.number < _number(session, after))
        rows = list(session.scalars(statement))
        jobs = render.summaries(session, rows[:limit])
    return render.page(jobs, lambda job: job.id, has_more=len(rows) > limit)


@router.get("/jobs/{job_id}")
def show_job(job_id: JobId, context: ContextDep) -> Job:
    """Shows one job."""
    with context.store.read() as session:
        return render.job(session, lifecycle.find(session, job_id))


@router.post("/jobs/{job_id}/cancel", status_code=202, response_model=Job)
def cancel_job(
    job_id: JobId,
    context: ContextDep,
    caller: CurrentCaller,
    body: CancelRequest | None = None,
    key: IdempotencyKey = None,
) -> Response:
    """Cancels a job.

    A running job first writes a final checkpoint, unless `checkpoint` is false.
    Cancelling an ended job changes nothing.
    """
    options = body or CancelRequest()
    # The key's scope includes the job's path.
    path = f"/v1/jobs/{job_id}/cancel"
    repeatable = IdempotentRequest.of(key, caller.token_id, path, options.model_dump())

    def cancel(session: Session, job: JobRow) -> None:
        # A cancelled job leaves the queue and may release its resources.
        lifecycle.cancel(session, job, final_checkpoint=options.checkpoint)
        session.flush()
        # The job may have been at the head of the queue, so others may be admitted now.
        queue.admit_jobs(session, lifecycle.lock_cluster(session, job.cluster))

    return _change(context, job_id, repeatable, cancel)


@router.post("/jobs/{job_id}/pause", status_code=202, response_model=Job)
def pause_job(
    job_id: JobId,
    context: ContextDep,
    caller: CurrentCaller,
    body: PauseRequest | None = None,
    key: IdempotencyKey = None,
) -> Response:
    """Pauses a job until it is resumed.

    A running job writes a checkpoint and releases its resources. Pausing a paused job
    changes nothing.
    """
    options = body or PauseRequest()
    path = f"/v1/jobs/{job_id}/pause"
    repeatable = IdempotentRequest.of(key, caller.token_id, path, options.model_dump())
    pause = partial(pausing.pause, reason=StatusReason(options.reason))
    return _change(context, job_id, repeatable, pause)


@router.post("/jobs/{job_id}/resume", status_code=202, response_model=Job)
def resume_job(
    job_id: JobId,
    context: ContextDep,
    caller: CurrentCaller,
    body: ResumeRequest | None = None,
    key: IdempotencyKey = None,
) -> Response:
    """Resumes a paused or ended job from its newest checkpoint.

    It continues in its folder as if it had never stopped. An ended job gets a new
    restart budget, and `changes` of its spec, such as more steps.
    """
    options = body or ResumeRequest()
    path = f"/v1/jobs/{job_id}/resume"
    repeatable = IdempotentRequest.of(key, caller.token_id, path, options.model_dump())
    submitter = Submitter(context.settings, context.store, context.agents)

    def resume(session: Session, job: JobRow) -> None:
        if JobState(job.status).is_terminal:
            submitter.resume(session, job, options.changes)
        elif options.changes:
            raise JobActiveError(
                f"the job is {job.status}; a spec can only be changed after the job's end"
            )
        else:
            pausing.resume(session, job)
        session.flush()
        queue.admit_jobs(session, lifecycle.lock_cluster(session, job.cluster))

    return _change(context, job_id, repeatable, resume)


@router.post("/jobs/{job_id}/checkpoint", status_code=202, response_model=Job)
def checkpoint_job(
    job_id: JobId, context: ContextDep, caller: CurrentCaller, key: IdempotencyKey = None
) -> Response:
    """Requests a checkpoint of a running job now.

    The event `checkpoint.committed` follows when the checkpoint is complete.
    """
    path = f"/v1/jobs/{job_id}/checkpoint"
    repeatable = IdempotentRequest.of(key, caller.token_id, path, None)
    return _change(context, job_id, repeatable, lifecycle.request_checkpoint)


@router.delete("/jobs/{job_id}", status_code=204)
def delete_job(job_id: JobId, context: ContextDep) -> None:
    """Deletes an ended job and its history.

    Files that the job wrote to its storage stay.
    """
    with context.store.write() as session:
        lifecycle.delete(session, lifecycle.lock(session, job_id))


def _earlier_response(
    context: Context, repeatable: IdempotentRequest
) -> StoredResponse | None:
    if repeatable.key is None:
        return None
    with context.store.read() as session:
        return repeatable.earlier_response(session)


def _store_job(
    context: Context,
    submitter: Submitter,
    spec: JobSpec,
    job: JobRow,
    repeatable: IdempotentRequest,
) -> tuple[StoredResponse, bool]:
    """Stores a prepared job; returns the response and whether it is an earlier one."""
    with context.store.write() as session:
        lifecycle.lock_cluster(session, job.cluster)
        # Checked again under the lock, because the same request may have been answered
        # meanwhile.
        earlier = repeatable.earlier_response(session)
        if earlier is not None:
            return earlier, True
        submitter.create(session, spec, job)
        body = render.job(session, job).model_dump(mode="json")
        repeatable.store_response(session, 201, body)
        return StoredResponse(201, body), False


def _created(response: StoredResponse, *, is_replay: bool) -> Response:
    headers = {"Location": f"/v1/jobs/{response.body['id']}"}
    if is_replay:
        headers["Idempotent-Replayed"] = "true"
    return JSONResponse(response.body, status_code=response.status, headers=headers)


def _change(
    context: Context,
    job_id: str,
    repeatable: IdempotentRequest,
    change: Callable[[Session, JobRow], Any],
) -> Response:
    """Changes a job and stores the response in one transaction."""
    with context.store.write() as session:
        job = lifecycle.lock(session, job_id)
        earlier = repeatable.earlier_response(session)
        if earlier is not None:
            headers = {"Idempotent-Replayed": "true"}
            return JSONResponse(earlier.body, status_code=earlier.status, headers=headers)
        # Rendered before the commit, so that the stored response equals the sent one.
        change(session, job)
        body = render.job(session, job).model_dump(mode="json")
        repeatable.store_response(session, 202, body)
    return JSONResponse(body, status_code=202)


def _states(names: str) -> list[str]:
    states = []
    for part in names.split(","):
        name = part.strip()
        try:
            states.append(JobState(name).value)
        except ValueError:
            detail = f"unknown status {name[:80]!r}; known: {', '.join(JobState)}"
            raise RequestInvalidError.of_field(
                "/query/status", "unknown_state", detail
            ) from None
    return states


def _labelled(key: str, value: str) -> sa.Select[int]:
    """Selects the numbers of the jobs with a label."""
    return sa.select(LabelRow.job).where(LabelRow.key == key, LabelRow.value == value)


def _number(session: Session, job_id: str) -> int:
    """Returns a job's number, by which lists are ordered; deleted jobs have one too."""
    number = session.scalar(sa.select(JobRow.number).where(JobRow.id == job_id))
    if number is None:
        detail = f"after={job_id[:80]!r}: no such job; use last_id of the previous page"
        raise RequestInvalidError.of_field("/query/after", "unknown_id", detail)
    return number
