"""/internal/v1: agents and drivers.

Bodies are workers/protocol/wire.py; not part of the public API.
"""

import time
from typing import Annotated, TypeVar

import sqlalchemy as sa
from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ValidationError
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from megatron_ray.config.problem import Problem
from service.http.dependencies import Context, Service
from service.http.errors import ProblemError
from service.jobs import ingest, lifecycle, submissions
from service.jobs.capacity import ClusterCapacity
from service.jobs.spec_problems import pointer_to
from service.store.schema import ClusterRow, JobRow
from workers.protocol.states import DesiredState
from workers.protocol.wire import (
    PROTOCOL,
    AgentReport,
    CheckResult,
    CursorReply,
    DesiredJob,
    DesiredReply,
    RecordBatch,
    RecordReply,
)

MOST_TERMINAL = 200
Wait = Annotated[float, Query(ge=0, le=3600)]
router = APIRouter(prefix="/internal/v1", include_in_schema=False)
Body = TypeVar("Body", bound=BaseModel)


@router.get("/agent/hello")
async def hello(service: Service) -> dict[str, object]:
    """What an agent asks first: the namespace of everything it may touch, and the
    folder that every node must see.
    """
    deployment = service.deployment
    root = service.settings.data_dir / "jobs"
    return {
        "protocol": PROTOCOL,
        "namespace": deployment.namespace,
        "deployment_id": deployment.id,
        "storage_root": str(root),
    }


@router.post("/agent/report")
async def report(request: Request, service: Service) -> dict[str, bool]:
    """The cluster as it is."""
    given = _parse(AgentReport, await request.body())
    ingest.check_protocol(given.protocol)
    _known(service, given.cluster)
    service.agents.heard(given.cluster)
    await run_in_threadpool(_take_report, service, given)
    return {"ok": True}


@router.get("/agent/desired")
async def desired_jobs(
    service: Service, cluster: str, after: int = 0, wait_s: Wait = 20.0
) -> Response:
    """All that the cluster should be doing; answers when there is something newer than
    `after`, or when the wait is over.
    """
    _known(service, cluster)
    service.agents.heard(cluster)
    deadline = time.monotonic() + min(wait_s, service.settings.max_wait_s)
    with service.hub.ticket(lifecycle.desired_topic(cluster)) as ticket:
        while await run_in_threadpool(_revision, service, cluster) == after:
            left = deadline - time.monotonic()
            if left <= 0 or service.hub.closed:
                break
            await ticket.wait(left)
    service.agents.heard(cluster)
    reply = await run_in_threadpool(_desired_reply, service, cluster)
    return _json(reply.model_copy(update={"checks": service.agents.open_checks(cluster)}))


@router.post("/agent/checks")
async def answer_check(request: Request, service: Service) -> dict[str, bool]:
    """What the agent found when it looked at a spec's paths."""
    given = _parse(CheckResult, await request.body())
    ingest.check_protocol(given.protocol)
    service.agents.answer(
        given.check_id,
        tuple(Problem(item.pointer, item.code, item.detail) for item in given.problems),
    )
    return {"ok": True}


@router.get("/jobs/{job_id}/cursor")
async def cursor(job_id: str, service: Service, epoch: int) -> Response:
    """What is stored of each source, for a driver that has just started; from here on
    lower epochs are refused.
    """
    return _json(await run_in_threadpool(_cursor, service, job_id, epoch))


@router.post("/jobs/{job_id}/records")
async def take_records(job_id: str, request: Request, service: Service) -> Response:
    """Stores a batch, all of it or nothing; sending it again is safe."""
    reply = await run_in_threadpool(_take_records, service, job_id, await request.body())
    return _json(reply)


@router.get("/jobs/{job_id}/desired")
async def desired_job(
    job_id: str, service: Service, after: int = 0, wait_s: Wait = 20.0
) -> Response:
    """What one job's driver should be doing; answers at once when that is newer than
    `after`.
    """
    deadline = time.monotonic() + min(wait_s, service.settings.max_wait_s)
    with service.hub.ticket(lifecycle.job_topic(job_id)) as ticket:
        while (
            found := await run_in_threadpool(_desired_one, service, job_id)
        ).revision == after:
            left = deadline - time.monotonic()
            if left <= 0 or service.hub.closed:
                break
            await ticket.wait(left)
    return _json(found)


def _take_report(service: Context, given: AgentReport) -> None:
    with service.store.read() as session:
        unresolved = submissions.unresolved(session, given.cluster)
    room = ClusterCapacity(given.nodes)
    answers = (
        {
            job: submissions.answer(spec, room, job_dir)
            for job, (spec, job_dir) in unresolved.items()
        }
        if room.known
        else {}
    )
    with service.store.write() as session:
        row = lifecycle.lock_cluster(session, given.cluster)
        before = None if row.report is None else AgentReport.model_validate(row.report)
        row.report = given.model_dump(mode="json")
        row.reported_at = time.time()
        session.flush()
        submissions.settle(session, row, answers)
        session.flush()
        lifecycle.admit(session, row)
        if before is None or (before.drivers, before.orphans, before.agent_id) != (
            given.drivers,
            given.orphans,
            given.agent_id,
        ):
            lifecycle.raise_revision(
                session, given.cluster
            )  # which jobs are listed depends on what the agent has seen


def _revision(service: Context, cluster: str) -> int:
    with service.store.read() as session:
        return (
            session.scalar(sa.select(ClusterRow.revision).where(ClusterRow.name == cluster))
            or 0
        )


def _desired_reply(service: Context, cluster: str) -> DesiredReply:
    with service.store.read() as session:
        row = session.get(ClusterRow, cluster)
        if row is None:
            return DesiredReply(revision=0)
        seen = (
            set() if row.report is None else _seen(AgentReport.model_validate(row.report))
        )
        here = sa.select(JobRow).where(JobRow.cluster == cluster)
        wanted = [
            job for job in lifecycle.active(session, cluster) if job.world_size is not None
        ]
        ended = list(
            session.scalars(
                here.where(
                    JobRow.status.in_(lifecycle.TERMINAL),
                    JobRow.id.in_(seen),
                    JobRow.deleted_at.is_(None),
                )
            )
        )
        over = sa.select(JobRow.id).where(
            JobRow.cluster == cluster, JobRow.status.in_(lifecycle.TERMINAL)
        )
        latest = session.scalars(over.order_by(JobRow.ended_at.desc()).limit(MOST_TERMINAL))
        terminal = {*latest, *session.scalars(over.where(JobRow.id.in_(seen)))}
        listed = tuple(_desired(service, job) for job in (*wanted, *ended))
        return DesiredReply(
            revision=row.revision, jobs=listed, terminal=tuple(sorted(terminal))
        )


def _seen(report: AgentReport) -> set[str]:
    """Jobs of which the agent has seen something alive: a driver, or a name `<job>/...`
    it cannot place.
    """
    return {driver.job_id for driver in report.drivers} | {
        name.partition("/")[0] for name in report.orphans
    }


def _desired(service: Context, job: JobRow) -> DesiredJob:
    return DesiredJob(
        job_id=job.id,
        desired=DesiredState(job.desired),
        revision=job.desired_revision,
        spec=job.resolved_spec,
        job_dir=job.job_dir,
        token=service.auth.job_token(job.id),
        final_checkpoint=job.final_checkpoint,
        checkpoint_requests=job.checkpoint_requests,
    )


def _desired_one(service: Context, job_id: str) -> DesiredJob:
    with service.store.read() as session:
        return _desired(service, lifecycle.find(session, job_id))


def _cursor(service: Context, job_id: str, epoch: int) -> CursorReply:
    with service.store.write() as session:
        job = lifecycle.lock(session, job_id)
        ingest.take_epoch(job, epoch)
        return CursorReply(stored=ingest.stored(session, job))


def _take_records(service: Context, job_id: str, body: bytes) -> RecordReply:
    batch = _parse(RecordBatch, body)
    if batch.job_id != job_id:
        raise ProblemError(
            "request_invalid",
            f"the batch is for {batch.job_id[:80]!r}, the address for {job_id}; they must agree",
        )
    with service.store.write() as session:
        stored = ingest.apply(service.store, session, batch)
        reply = RecordReply(stored=stored, desired=_desired_in(service, session, job_id))
    service.telemetry.records.inc(len(batch.records))
    return reply


def _desired_in(service: Context, session: Session, job_id: str) -> DesiredJob:
    session.flush()
    return _desired(service, lifecycle.find(session, job_id))


def _known(service: Context, cluster: str) -> None:
    if cluster not in service.settings.clusters:
        text = (
            f"cluster {cluster[:80]!r} is not set up here; known: "
            f"{', '.join(service.settings.clusters)}"
        )
        raise ProblemError(
            "request_invalid", text, errors=[Problem("/cluster", "unknown_name", text)]
        )


def _parse(model: type[Body], body: bytes) -> Body:
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        found = [
            Problem(pointer_to(item["loc"]), item["type"], item["msg"])
            for item in error.errors(include_url=False)
        ]
        raise ProblemError(
            "request_invalid",
            "; ".join(f"{item.pointer}: {item.detail}" for item in found),
            errors=found,
        ) from error


def _json(message: BaseModel) -> Response:
    return Response(message.model_dump_json(), media_type="application/json")
