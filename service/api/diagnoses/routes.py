"""Serves /v1/jobs/{id}/diagnosis: what all ranks did at one moment."""

from typing import Any

from fastapi import APIRouter, Depends
from fastapi.responses import Response

from service.api import render
from service.api.diagnoses.bodies import Diagnosis
from service.api.jobs import IdempotencyKey, change_job
from service.api.models import Job, JobId
from service.exceptions import NotFoundError
from service.http.bodies import BoundedBodyRoute
from service.http.dependencies import ContextDep, CurrentCaller
from service.http.idempotency import IdempotentRequest
from service.http.parameters import check_query
from service.jobs import lifecycle
from service.jobs.reports import diagnoses

router = APIRouter(
    prefix="/v1",
    tags=["history"],
    dependencies=[Depends(check_query)],
    route_class=BoundedBodyRoute,
)


@router.get("/jobs/{job_id}/diagnosis")
def get_diagnosis(job_id: JobId, context: ContextDep) -> Diagnosis:
    """Returns the newest diagnosis: what each rank did, and which one the others wait for.

    There is one after each hang, taken before any process is ended, and one after each
    request. It names functions and lines, never values.
    """
    with context.store.read() as session:
        job = lifecycle.find(session, job_id)
        row = diagnoses.newest(session, job)
        if row is None:
            raise NotFoundError.of_field(
                "/path/job_id",
                "no_diagnosis",
                f"the job has no diagnosis; POST /v1/jobs/{job_id}/diagnosis requests one",
            )
        return _body(job_id, row.seq, row.attempt, row.created_at, row.report)


@router.post(
    "/jobs/{job_id}/diagnosis", status_code=202, response_model=Job, responses={409: {}}
)
def diagnose_job(
    job_id: JobId, context: ContextDep, caller: CurrentCaller, key: IdempotencyKey = None
) -> Response:
    """Requests a diagnosis of a job now; training goes on.

    The event `job.diagnosed` follows when every rank has answered or is late.
    """
    path = f"/v1/jobs/{job_id}/diagnosis"
    repeatable = IdempotentRequest.of(key, caller.token_id, path, None)
    return change_job(context, job_id, repeatable, lifecycle.request_diagnosis)


def _body(
    job_id: str, seq: int, attempt: int, created_at: float, report: dict[str, Any]
) -> Diagnosis:
    # A driver of another version may send more fields, or fewer.
    known = {name: report[name] for name in Diagnosis.model_fields if name in report}
    return Diagnosis.model_validate(
        {
            **render.redacted_json(known),
            "id": f"{job_id}.{seq}",
            "job_id": job_id,
            "attempt": attempt,
            "created_at": render.utc(created_at),
        }
    )
