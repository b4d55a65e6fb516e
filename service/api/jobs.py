"""/v1/jobs: make, list, show, cancel, checkpoint, delete.

Must not know: tables' columns beyond filtering.
"""

from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import JSONResponse, Response
from sqlalchemy.orm import Session

from megatron_ray.config.problem import Problem
from service.api import render
from service.api.models import CancelRequest, Job, JobSummary, Page
from service.http.dependencies import CurrentCaller, Service
from service.http.errors import ProblemError
from service.http.idempotency import IdempotentRequest
from service.jobs import lifecycle
from service.jobs.submit import submit
from service.store.schema import JobRow, LabelRow
from workers.protocol.job import JobSpec
from workers.protocol.states import JobState

router = APIRouter(prefix="/v1", tags=["jobs"])
Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="Repeating a request with its key gives the first answer again.",
    ),
]


@router.post("/jobs", status_code=201, response_model=Job)
async def create_job(
    spec: JobSpec, request: Request, service: Service, by: CurrentCaller, key: Key = None
) -> Response:
    """Submits a job.

    Everything wrong with the spec is answered at once, before anything is stored or
    reserved.
    """
    given = await request.json()
    answer = await submit(
        service, spec, given, IdempotentRequest.of(key, by.token_id, "/v1/jobs", given)
    )
    headers = {"Location": f"/v1/jobs/{answer.body['id']}"}
    if answer.replayed:
        headers["Idempotent-Replayed"] = "true"
    return JSONResponse(answer.body, status_code=answer.status, headers=headers)


@router.get("/jobs")
def list_jobs(
    request: Request,
    service: Service,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[
        str | None, Query(description="Id of the last job of the page before.")
    ] = None,
    status: Annotated[str | None, Query(description="States, separated by commas.")] = None,
) -> Page[JobSummary]:
    """Jobs, newest first.

    `metadata[key]=value` keeps those with that label; several must all hold.
    """
    statement = (
        sa.select(JobRow)
        .where(JobRow.deleted_at.is_(None))
        .order_by(JobRow.number.desc())
        .limit(limit + 1)
    )
    if status is not None:
        statement = statement.where(JobRow.status.in_(_states(status)))
    for name, value in request.query_params.multi_items():
        if name.startswith("metadata[") and name.endswith("]"):
            label = sa.select(LabelRow.job).where(
                LabelRow.key == name[9:-1], LabelRow.value == value
            )
            statement = statement.where(JobRow.number.in_(label))
    with service.store.read() as session:
        if after is not None:
            statement = statement.where(JobRow.number < _number(session, after))
        rows = list(session.scalars(statement))
        found = render.summaries(session, rows[:limit])
    return render.page(found, [item.id for item in found], has_more=len(rows) > limit)


@router.get("/jobs/{job_id}")
def show_job(job_id: str, service: Service) -> Job:
    """One job."""
    with service.store.read() as session:
        return render.job(session, lifecycle.find(session, job_id))


@router.post("/jobs/{job_id}/cancel", status_code=202, response_model=Job)
def cancel_job(
    job_id: str,
    service: Service,
    by: CurrentCaller,
    body: CancelRequest | None = None,
    key: Key = None,
) -> Response:
    """Asks for the job's end; `checkpoint` says whether it writes a last one.

    Cancelling an ended job changes nothing.
    """
    wish = body or CancelRequest()
    repeat = IdempotentRequest.of(
        key, by.token_id, f"/v1/jobs/{job_id}/cancel", wish.model_dump()
    )

    def work(session: Session, job: JobRow) -> None:
        lifecycle.cancel(session, job, final_checkpoint=wish.checkpoint)
        session.flush()
        lifecycle.admit(session, lifecycle.lock_cluster(session, job.cluster))

    return _change(service, job_id, repeat, work)


@router.post("/jobs/{job_id}/checkpoint", status_code=202, response_model=Job)
def checkpoint_job(
    job_id: str, service: Service, by: CurrentCaller, key: Key = None
) -> Response:
    """Asks a running job for one checkpoint now; an event tells when it is committed."""
    repeat = IdempotentRequest.of(key, by.token_id, f"/v1/jobs/{job_id}/checkpoint", None)
    return _change(service, job_id, repeat, lifecycle.request_checkpoint)


@router.delete("/jobs/{job_id}", status_code=204)
def delete_job(job_id: str, service: Service) -> None:
    """Forgets an ended job and its history; what it wrote to its storage stays."""
    with service.store.write() as session:
        lifecycle.delete(session, lifecycle.lock(session, job_id))


def _change(
    service: Service, job_id: str, repeat: IdempotentRequest, work: Any
) -> Response:
    with service.store.write() as session:
        job = lifecycle.lock(session, job_id)
        earlier = repeat.earlier(session)
        if earlier is not None:
            return JSONResponse(
                earlier[1], status_code=earlier[0], headers={"Idempotent-Replayed": "true"}
            )
        work(session, job)
        body = render.job(session, job).model_dump(mode="json")
        repeat.remember(session, 202, body)
    return JSONResponse(body, status_code=202)


def _states(text: str) -> list[str]:
    known = [state.value for state in JobState]
    given = [name.strip() for name in text.split(",")]
    wrong = [name for name in given if name not in known]
    if wrong:
        detail = f"status {wrong[0][:80]!r} is unknown; known: {', '.join(known)}"
        raise ProblemError(
            "request_invalid",
            detail,
            errors=[Problem("/query/status", "unknown_state", detail)],
        )
    return given


def _number(session: Session, job_id: str) -> int:
    found = session.scalar(sa.select(JobRow.number).where(JobRow.id == job_id))
    if found is None:
        detail = f"after={job_id[:80]!r} is no job's id; use last_id of the page before"
        raise ProblemError(
            "request_invalid",
            detail,
            errors=[Problem("/query/after", "unknown_id", detail)],
        )
    return found
