"""Serves /v1/jobs/{id}/profiles: where the time and memory of steps go."""

from functools import partial
from typing import Any

from fastapi import APIRouter, Depends
from fastapi.responses import Response
from sqlalchemy.orm import Session

from service.api import render
from service.api.jobs import IdempotencyKey, change_job
from service.api.models import JobId, Page
from service.api.profiles.bodies import Profile, ProfileRequest
from service.http.bodies import BoundedBodyRoute
from service.http.dependencies import ContextDep, CurrentCaller
from service.http.idempotency import IdempotentRequest
from service.http.parameters import check_query
from service.jobs import lifecycle
from service.jobs.reports import profiles
from service.store.schema import JobRow, ProfileRow

router = APIRouter(
    prefix="/v1",
    tags=["history"],
    dependencies=[Depends(check_query)],
    route_class=BoundedBodyRoute,
)


@router.get("/jobs/{job_id}/profiles")
def list_profiles(job_id: JobId, context: ContextDep) -> Page[Profile]:
    """Lists a job's newest profiles, oldest first."""
    with context.store.read() as session:
        job = lifecycle.find(session, job_id)
        bodies = [_body(job, row) for row in profiles.of_job(session, job)]
    return render.page(bodies, lambda body: body.id, total=len(bodies))


@router.post(
    "/jobs/{job_id}/profiles", status_code=202, response_model=Profile, responses={409: {}}
)
def profile_job(
    job_id: JobId,
    body: ProfileRequest,
    context: ContextDep,
    caller: CurrentCaller,
    key: IdempotencyKey = None,
) -> Response:
    """Requests a profile of coming steps of a running job.

    The event `job.profiled` follows when every rank has written its files, or cannot. The
    other ranks wait for those that are profiled, whose steps take longer.
    """
    path = f"/v1/jobs/{job_id}/profiles"
    options = body.model_dump(mode="json")
    repeatable = IdempotentRequest.of(key, caller.token_id, path, options)
    request = partial(profiles.request, steps=body.steps, ranks=body.ranks)
    return change_job(context, job_id, repeatable, request, _rendered)


def _rendered(_: Session, job: JobRow, row: ProfileRow) -> Profile:
    return _body(job, row)


def _body(job: JobRow, row: ProfileRow) -> Profile:
    values: dict[str, Any] = {
        "id": f"{job.id}.profile-{row.attempt}-{row.number}",
        "job_id": job.id,
        "number": row.number,
        "attempt": row.attempt,
        "created_at": render.utc(row.created_at),
        "status": profiles.status(job, row),
        "first_step": row.first_step,
        "last_step": row.last_step,
        "ranks": row.ranks,
        "folder": render.redacted_json(profiles.folder(job, row)),
        "reports": render.redacted_json(profiles.reports(job, row)),
    }
    return Profile.model_validate(values)
