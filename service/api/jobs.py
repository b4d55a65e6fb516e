"""Serves /v1/jobs: create, list, get, pause, resume, resize, delete, cancel many."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, BeforeValidator, Field
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from service.api import render
from service.api.models import (
    MAX_JOBS_PER_REQUEST,
    NAME_PATTERN,
    CancelJobsRequest,
    Cancellation,
    CancelRequest,
    Job,
    JobId,
    JobSummary,
    Page,
    PauseRequest,
    ResizeRequest,
    ResumeRequest,
)
from service.exceptions import JobActiveError, RequestInvalidError
from service.http.bodies import BoundedBodyRoute
from service.http.dependencies import Context, ContextDep, CurrentCaller
from service.http.errors import ProblemError
from service.http.idempotency import MAX_KEY_CHARS, IdempotentRequest, StoredResponse
from service.http.parameters import (
    WRITTEN_NUMBER,
    check_query,
    deep_object,
    labels_of,
    split_commas,
)
from service.jobs import lifecycle, pausing, queue
from service.jobs.elastic import resizing
from service.jobs.submit import PreparedJob, Submitter
from service.store.schema import JobRow
from service.store.selection import JobFilter
from workers.protocol.job import JobSpec
from workers.protocol.states import JobState, StatusReason

_METADATA = deep_object(
    "metadata",
    "Labels to list, as `metadata[<label>]=<value>`; with several, all must match.",
)
router = APIRouter(
    prefix="/v1",
    tags=["jobs"],
    dependencies=[Depends(check_query)],
    route_class=BoundedBodyRoute,
)
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        # Checked where it is used, with a message that names the remedy.
        json_schema_extra={"minLength": 1, "maxLength": MAX_KEY_CHARS},
        description="Makes the request safe to repeat: the same key gets the first response "
        "again. Keys are kept for 7 days.",
    ),
]


@router.post("/jobs", status_code=201, response_model=Job, responses={409: {}})
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
    submitter = Submitter(context.settings, context.store, context.agents, context.compute)
    prepared = await submitter.prepare(spec, submitted)
    store = partial(_store_job, context, submitter, prepared, repeatable)
    response, is_replay = await run_in_threadpool(store)
    if not is_replay:
        context.telemetry.jobs_created.inc()
    return _created(response, is_replay=is_replay)


@router.get("/jobs", openapi_extra={"parameters": [_METADATA]})
def list_jobs(
    request: Request,
    context: ContextDep,
    limit: Annotated[
        int, Field(ge=1, le=100), WRITTEN_NUMBER, Query(description="Jobs per page.")
    ] = 20,
    after: Annotated[
        str | None,
        Query(
            min_length=1,
            max_length=64,
            description="Id of the last job of the previous page.",
        ),
    ] = None,
    status: Annotated[
        list[JobState] | None,
        BeforeValidator(split_commas),
        Query(description="States to list; may be repeated. Default: all."),
    ] = None,
    name: Annotated[
        str | None,
        Query(
            min_length=1,
            max_length=63,
            pattern=NAME_PATTERN,
            description="Name to list; `*` stands for any characters. Default: all.",
        ),
    ] = None,
) -> Page[JobSummary]:
    """Lists jobs, newest first."""
    chosen = JobFilter(status, name, labels_of(request, "metadata"))
    statement = chosen.select().limit(limit + 1)  # one more shows whether there is a page
    with context.store.read() as session:
        # Ordered by number, so that jobs submitted meanwhile do not shift the pages.
        if after is not None:
            statement = statement.where(JobRow.number < _number(session, after))
        rows = list(session.scalars(statement))
        jobs = render.summaries(session, rows[:limit])
        total = chosen.count(session)
    return render.page(jobs, lambda job: job.id, has_more=len(rows) > limit, total=total)


@router.get("/jobs/{job_id}")
def get_job(job_id: JobId, context: ContextDep) -> Job:
    """Returns one job."""
    with context.store.read() as session:
        return render.job(session, lifecycle.find(session, job_id))


@router.post("/jobs:cancel", status_code=202, response_model=Cancellation)
def cancel_jobs(
    body: CancelJobsRequest,
    context: ContextDep,
    caller: CurrentCaller,
    key: IdempotencyKey = None,
) -> Response:
    """Cancels several jobs: those named by id, or those that match.

    Running jobs first write a final checkpoint, unless `checkpoint` is false. Jobs that
    have ended stay as they are.
    """
    options = body.model_dump(mode="json")
    repeatable = IdempotentRequest.of(key, caller.token_id, "/v1/jobs:cancel", options)
    with context.store.write() as session:
        earlier = repeatable.earlier_response(session)
        if earlier is not None:
            return _answer(earlier, is_replay=True)
        job_ids = body.ids
        if job_ids is None:
            job_ids = _active_ids(session, body)
        has_more = len(job_ids) > MAX_JOBS_PER_REQUEST
        job_ids = job_ids[:MAX_JOBS_PER_REQUEST]
        result = queue.cancel_all(session, job_ids, final_checkpoint=body.checkpoint)
        answer = render.cancellation(result, job_ids, has_more=has_more)
        response = StoredResponse(202, answer.model_dump(mode="json"))
        repeatable.store_response(session, response.status, response.body)
    return _answer(response)


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
        queue.cancel_all(session, [job.id], final_checkpoint=options.checkpoint)

    return change_job(context, job_id, repeatable, cancel)


@router.post(
    "/jobs/{job_id}/pause", status_code=202, response_model=Job, responses={409: {}}
)
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
    return change_job(context, job_id, repeatable, pause)


@router.post(
    "/jobs/{job_id}/resume", status_code=202, response_model=Job, responses={409: {}}
)
async def resume_job(
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
    earlier = await run_in_threadpool(_earlier_change, context, job_id, repeatable)
    if earlier is not None:
        return _answer(earlier, is_replay=True)
    submitter = Submitter(context.settings, context.store, context.agents, context.compute)
    changed = await submitter.prepare_resume(job_id, options.changes)

    def resume(session: Session, job: JobRow) -> None:
        if JobState(job.status).is_terminal:
            submitter.resume(session, job, changed)
        elif options.changes:
            raise JobActiveError(
                f"the job is {job.status}; a spec can only be changed after the job's end"
            )
        else:
            pausing.resume(session, job)
        session.flush()
        queue.admit_jobs(session, lifecycle.lock_cluster(session, job.cluster))

    return await run_in_threadpool(change_job, context, job_id, repeatable, resume)


@router.post(
    "/jobs/{job_id}/resize", status_code=202, response_model=Job, responses={409: {}}
)
def resize_job(
    job_id: JobId,
    body: ResizeRequest,
    context: ContextDep,
    caller: CurrentCaller,
    key: IdempotencyKey = None,
) -> Response:
    """Changes a job's number of data-parallel replicas.

    A running job writes a checkpoint and continues from it at the new size, with the same
    batches. Resizing to its own size changes nothing.
    """
    path = f"/v1/jobs/{job_id}/resize"
    repeatable = IdempotentRequest.of(key, caller.token_id, path, body.model_dump())
    return change_job(context, job_id, repeatable, partial(resizing.resize, dp=body.dp))


@router.post(
    "/jobs/{job_id}/checkpoint", status_code=202, response_model=Job, responses={409: {}}
)
def checkpoint_job(
    job_id: JobId, context: ContextDep, caller: CurrentCaller, key: IdempotencyKey = None
) -> Response:
    """Requests a checkpoint of a running job now.

    The event `checkpoint.committed` follows when the checkpoint is complete.
    """
    path = f"/v1/jobs/{job_id}/checkpoint"
    repeatable = IdempotentRequest.of(key, caller.token_id, path, None)
    return change_job(context, job_id, repeatable, lifecycle.request_checkpoint)


@router.delete("/jobs/{job_id}", status_code=204, responses={409: {}})
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
        earlier = repeatable.earlier_response(session)
        if earlier is not None:
            _check_still_there(session, earlier)
        return earlier


def _earlier_change(
    context: Context, job_id: str, repeatable: IdempotentRequest
) -> StoredResponse | None:
    with context.store.read() as session:
        lifecycle.find(session, job_id)
        return repeatable.earlier_response(session)


def _check_still_there(session: Session, created: StoredResponse) -> None:
    """Raises ProblemError when the job that a response names has been deleted since."""
    job_id = created.body["id"]
    statement = sa.select(JobRow.deleted_at).where(JobRow.id == job_id)
    if session.scalar(statement) is not None:
        raise ProblemError(
            "job_deleted",
            f"this Idempotency-Key has created {job_id}, which was deleted; use a new key to "
            "create another job",
        )


def _store_job(
    context: Context,
    submitter: Submitter,
    prepared: PreparedJob,
    repeatable: IdempotentRequest,
) -> tuple[StoredResponse, bool]:
    """Stores a prepared job; returns the response and whether it is an earlier one."""
    with context.store.write() as session:
        job = prepared.row
        lifecycle.lock_cluster(session, job.cluster)
        # Checked again under the lock, because the same request may have been answered
        # meanwhile.
        earlier = repeatable.earlier_response(session)
        if earlier is not None:
            return earlier, True
        submitter.create(session, prepared)
        body = render.job(session, job).model_dump(mode="json")
        repeatable.store_response(session, 201, body)
        return StoredResponse(201, body), False


def _created(response: StoredResponse, *, is_replay: bool) -> Response:
    job_id = response.body["id"]
    location = {"Location": f"/v1/jobs/{job_id}"}
    return _answer(response, is_replay=is_replay, headers=location)


def _answer(
    response: StoredResponse,
    *,
    is_replay: bool = False,
    headers: Mapping[str, str] | None = None,
) -> Response:
    sent = dict(headers or {})
    if is_replay:
        sent["Idempotent-Replayed"] = "true"
    return JSONResponse(response.body, status_code=response.status, headers=sent)


def _rendered_job(session: Session, job: JobRow, _: object) -> Job:
    return render.job(session, job)


def change_job(
    context: Context,
    job_id: str,
    repeatable: IdempotentRequest,
    change: Callable[[Session, JobRow], Any],
    rendered: Callable[[Session, JobRow, Any], BaseModel] = _rendered_job,
) -> Response:
    """Changes a job and stores the response in one transaction.

    `rendered` returns the body of the response from what `change` has returned.
    """
    with context.store.write() as session:
        job = lifecycle.lock(session, job_id)
        earlier = repeatable.earlier_response(session)
        if earlier is not None:
            return _answer(earlier, is_replay=True)
        # Rendered before the commit, so that the stored response equals the sent one.
        changed = change(session, job)
        body = rendered(session, job, changed).model_dump(mode="json")
        response = StoredResponse(202, body)
        repeatable.store_response(session, response.status, body)
    return _answer(response)


def _active_ids(session: Session, body: CancelJobsRequest) -> list[str]:
    """Returns the ids of the jobs that match and have not ended, newest first.

    One more than a request may change shows that there are more.
    """
    statuses = [state for state in body.status or JobState if not state.is_terminal]
    chosen = JobFilter(statuses, body.name, (body.metadata or {}).items())
    statement = chosen.select().limit(MAX_JOBS_PER_REQUEST + 1)
    return [job.id for job in session.scalars(statement)]


def _number(session: Session, job_id: str) -> int:
    """Returns a job's number, by which lists are ordered; deleted jobs have one too."""
    number = session.scalar(sa.select(JobRow.number).where(JobRow.id == job_id))
    if number is None:
        detail = f"after={job_id[:80]!r}: no such job; use last_id of the previous page"
        raise RequestInvalidError.of_field("/query/after", "unknown_id", detail)
    return number
