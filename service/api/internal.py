"""Serves /internal/v1 to agents and drivers.

Bodies are those of `workers.protocol.wire`. Not part of the public API.
"""

import time
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import sqlalchemy as sa
from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ValidationError
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from megatron_ray.config.errors.messages import plain_message
from megatron_ray.config.errors.spec_problems import pointer_to
from megatron_ray.config.problem import Problem
from service.exceptions import DriverReplacedError, RequestInvalidError
from service.http.dependencies import Context, ContextDep
from service.jobs import cluster_fit, ingest, lifecycle, queue
from service.jobs.agents import CheckedPaths
from service.jobs.capacity import ClusterCapacity
from service.jobs.cluster_fit import Resolution
from service.jobs.elastic import expansion
from service.store import node_exclusions
from service.store.schema import ClusterRow, JobRow
from workers.protocol.states import DesiredState, JobState
from workers.protocol.wire import (
    PROTOCOL,
    AgentReport,
    CheckRequest,
    CheckResult,
    CursorReply,
    DesiredJob,
    DesiredReply,
    RecordBatch,
    RecordReply,
)

MAX_TERMINAL = 200
"""Maximum number of ended jobs sent to the agent, besides those that it still
reports."""
WaitSeconds = Annotated[float, Query(ge=0, le=3600)]
router = APIRouter(prefix="/internal/v1", include_in_schema=False)
Body = TypeVar("Body", bound=BaseModel)


# ---- agents


@router.get("/agent/hello")
async def hello(context: ContextDep) -> dict[str, object]:
    """Returns what an agent needs first.

    That is the namespace of everything it may touch, and the folder that every node must
    be able to read.
    """
    deployment = context.deployment
    root = context.settings.jobs_dir
    return {
        "protocol": PROTOCOL,
        "namespace": deployment.namespace,
        "deployment_id": deployment.id,
        "storage_root": str(root),
    }


@router.post("/agent/report")
async def report(request: Request, context: ContextDep) -> dict[str, bool]:
    """Stores the state of a cluster."""
    agent_report = _parse(AgentReport, await request.body())
    ingest.check_protocol(agent_report.protocol)
    _check_cluster(context, agent_report.cluster)
    context.agents.record_contact(agent_report.cluster)
    await run_in_threadpool(_store_report, context, agent_report)
    return {"ok": True}


@router.get("/agent/desired")
async def desired_jobs(
    context: ContextDep, cluster: str, after: int = 0, wait_s: WaitSeconds = 20.0
) -> Response:
    """Returns the desired state of all jobs of a cluster.

    Answers as soon as the revision differs from `after`, or when the wait is over.
    """
    _check_cluster(context, cluster)
    context.agents.record_contact(cluster)
    deadline = time.monotonic() + min(wait_s, context.settings.max_wait_s)
    # Subscribed before the first read, so that no commit falls between the two.
    with context.notifier.subscribe(lifecycle.desired_topic(cluster)) as subscription:
        # Not `>`, because the revision of another database may be smaller.
        while await run_in_threadpool(_revision, context, cluster) == after:
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0 or context.notifier.is_closed:
                break
            await subscription.wait(remaining_s)
    # A long poll counts as contact during its whole wait.
    context.agents.record_contact(cluster)
    reply = await run_in_threadpool(_desired_reply, context, cluster)
    checks: list[CheckRequest] = []
    resume_checks: list[CheckRequest] = []
    for check in context.agents.open_checks(cluster):
        if check.resumed is None:
            checks.append(check)
        else:
            resume_checks.append(check)
    update = {"checks": tuple(checks), "resume_checks": tuple(resume_checks)}
    return _json(reply.model_copy(update=update))


@router.post("/agent/checks")
async def check_result(request: Request, context: ContextDep) -> dict[str, bool]:
    """Receives the problems that the agent found in a spec's paths."""
    result = _parse(CheckResult, await request.body())
    ingest.check_protocol(result.protocol)
    problems = []
    for item in result.problems:
        problems.append(Problem(item.pointer, item.code, item.detail))
    checked = CheckedPaths(tuple(problems), result.notes)
    context.agents.finish_check(result.check_id, checked)
    return {"ok": True}


# ---- drivers


@router.get("/jobs/{job_id}/cursor")
async def cursor(
    job_id: str, context: ContextDep, epoch: int, last_n: int | None = None
) -> Response:
    """Returns the highest number stored of each source, for a driver that has started.

    From here on lower epochs are refused. `last_n` is the highest number of the driver's
    records in the job's folder; None from drivers of earlier versions.
    """
    return _json(await run_in_threadpool(_cursor, context, job_id, epoch, last_n))


@router.post("/jobs/{job_id}/records")
async def store_records(job_id: str, request: Request, context: ContextDep) -> Response:
    """Stores a batch of records atomically; sending it again is safe."""
    body = await request.body()
    return _json(await run_in_threadpool(_store_records, context, job_id, body))


@router.get("/jobs/{job_id}/desired")
async def desired_job(
    job_id: str, context: ContextDep, after: int = 0, wait_s: WaitSeconds = 20.0
) -> Response:
    """Returns the desired state of one job.

    Answers as soon as the revision differs from `after`, or when the wait is over.
    """
    deadline = time.monotonic() + min(wait_s, context.settings.max_wait_s)
    with context.notifier.subscribe(lifecycle.job_topic(job_id)) as subscription:
        desired = await run_in_threadpool(_desired_one, context, job_id)
        while desired.revision == after:
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0 or context.notifier.is_closed:
                break
            await subscription.wait(remaining_s)
            desired = await run_in_threadpool(_desired_one, context, job_id)
    return _json(desired)


# ---- database work, in threads


def _store_report(context: Context, agent_report: AgentReport) -> None:
    with context.store.read() as session:
        marked = node_exclusions.marked(session, agent_report)
    resolutions = _resolve_waiting_jobs(context, marked)
    with context.store.write() as session:
        # In this order: first jobs are resolved, then queued jobs are admitted with the new
        # nodes; both are committed together.
        row = lifecycle.lock_cluster(session, agent_report.cluster)
        has_changed = _has_changed(row, agent_report)
        node_exclusions.forget_lost(session, agent_report)
        # Again, because the list may have changed before the lock was acquired.
        marked = node_exclusions.marked(session, agent_report)
        row.report = marked.model_dump(mode="json")
        row.reported_at = time.time()
        session.flush()
        cluster_fit.resolve_waiting_jobs(session, row, resolutions)
        session.flush()
        queue.admit_jobs(session, row)
        session.flush()
        expansion.expand_jobs(session, row)
        if has_changed:
            # The set of ended jobs sent to the agent depends on its report.
            lifecycle.raise_revision(session, agent_report.cluster)


def _resolve_waiting_jobs(
    context: Context, agent_report: AgentReport
) -> dict[str, Resolution]:
    """Returns how the jobs that waited for this cluster run on it, by job id.

    Runs before the transaction, because a search for a layout may take seconds, during
    which no other request could write.
    """
    capacity = ClusterCapacity(agent_report.nodes, agent_report.node_groups)
    if not capacity.is_known:
        return {}
    with context.store.read() as session:
        waiting = cluster_fit.jobs_waiting_for_cluster(session, agent_report.cluster)
    resolutions = {}
    for job_id, job in waiting.items():
        resolutions[job_id] = cluster_fit.check_and_resolve(job, capacity)
    return resolutions


def _has_changed(row: ClusterRow, agent_report: AgentReport) -> bool:
    """Whether the agent is new or reports what its jobs depend on other than before.

    That is drivers, orphans and nodes without access to the storage.
    """
    if row.report is None:
        return True
    before = AgentReport.model_validate(row.report)
    return (before.drivers, before.orphans, before.agent_id, _without_storage(before)) != (
        agent_report.drivers,
        agent_report.orphans,
        agent_report.agent_id,
        _without_storage(agent_report),
    )


def _without_storage(report: AgentReport) -> set[str]:
    return {node.node_id for node in report.nodes if node.storage_ok is False}


def _revision(context: Context, cluster: str) -> int:
    statement = sa.select(ClusterRow.revision).where(ClusterRow.name == cluster)
    with context.store.read() as session:
        return session.scalar(statement) or 0


def _desired_reply(context: Context, cluster: str) -> DesiredReply:
    with context.store.read() as session:
        row = session.get(ClusterRow, cluster)
        if row is None:
            return DesiredReply(revision=0)
        seen = _seen_jobs(row)
        has_ended = (JobRow.cluster == cluster, JobRow.status.in_(lifecycle.TERMINAL))
        # Remaining drivers of ended jobs need the desired state in order to exit.
        ended = sa.select(JobRow).where(
            *has_ended, JobRow.id.in_(seen), JobRow.deleted_at.is_(None)
        )
        jobs = [_desired(context, job) for job in session.scalars(ended)]
        about_cluster = _about_cluster(session, cluster)
        states = {}
        for job in queue.active_jobs(session, cluster):
            states[job.id] = JobState(job.status)
            # A job without a world size is not resolved yet and cannot be prepared.
            if job.world_size is not None:
                jobs.append(_desired(context, job, about_cluster))
        # Includes deleted jobs, whose leftovers must be removed too.
        ended_ids = sa.select(JobRow.id).where(*has_ended)
        latest = sa.select(JobRow.id, JobRow.status).where(*has_ended)
        latest = latest.order_by(JobRow.ended_at.desc()).limit(MAX_TERMINAL)
        terminal = set(session.scalars(ended_ids.where(JobRow.id.in_(seen))))
        for job_id, status in session.execute(latest):
            terminal.add(job_id)
            states[job_id] = JobState(status)
        return DesiredReply(
            revision=row.revision,
            jobs=tuple(jobs),
            terminal=tuple(sorted(terminal)),
            states=states,
        )


def _seen_jobs(row: ClusterRow) -> set[str]:
    """Returns the jobs with a living actor in the agent's report."""
    if row.report is None:
        return set()
    agent_report = AgentReport.model_validate(row.report)
    seen = set()
    for driver in agent_report.drivers:
        seen.add(driver.job_id)
    for name in agent_report.orphans:
        # Actors are named `<job>/<role>`.
        seen.add(name.partition("/")[0])
    return seen


def _desired(
    context: Context, job: JobRow, about_cluster: Mapping[str, Any] | None = None
) -> DesiredJob:
    return DesiredJob(
        job_id=job.id,
        desired=DesiredState(job.desired),
        revision=job.desired_revision,
        spec=job.resolved_spec,
        job_dir=job.job_dir,
        token=context.auth.job_token(job.id),
        final_checkpoint=job.final_checkpoint,
        checkpoint_requests=job.checkpoint_requests,
        diagnosis_requests=job.diagnosis_requests,
        profile=job.profile_order,
        resumes=job.resumes,
        **(about_cluster or {}),
    )


def _desired_one(context: Context, job_id: str) -> DesiredJob:
    with context.store.read() as session:
        return _desired_of(context, session, job_id)


def _cursor(context: Context, job_id: str, epoch: int, last_n: int | None) -> CursorReply:
    with context.store.write() as session:
        # A write, because the driver's epoch is stored before it sends anything.
        job = lifecycle.lock(session, job_id)
        ingest.take_epoch(job, epoch)
        stored = ingest.stored_numbers(session, job)
        is_lost = last_n is not None and ingest.fail_if_lost(session, job, stored, last_n)
    # After the commit, which an error would undo.
    if is_lost:
        raise DriverReplacedError("the job's folder has lost files, so the job has failed")
    return CursorReply(stored=stored)


def _store_records(context: Context, job_id: str, body: bytes) -> RecordReply:
    batch = _parse(RecordBatch, body)
    if batch.job_id != job_id:
        raise RequestInvalidError(
            f"the batch is for job {batch.job_id[:80]!r}, but the path names {job_id}; send "
            "both for the same job"
        )
    with context.store.write() as session:
        # The reply contains the desired state, which saves the driver a poll.
        stored = ingest.apply_batch(context.store, session, batch)
        reply = RecordReply(
            stored=stored, desired=_flushed_desired(context, session, job_id)
        )
    context.telemetry.records.inc(len(batch.records))
    return reply


def _flushed_desired(context: Context, session: Session, job_id: str) -> DesiredJob:
    """Returns the desired state after the records of this transaction."""
    session.flush()
    return _desired_of(context, session, job_id)


def _desired_of(context: Context, session: Session, job_id: str) -> DesiredJob:
    job = lifecycle.find(session, job_id)
    return _desired(context, job, _about_cluster(session, job.cluster))


def _about_cluster(session: Session, cluster: str) -> dict[str, Any]:
    """Returns the fields of a DesiredJob that all jobs of a cluster share."""
    return {
        "avoid_nodes": cluster_fit.avoided_nodes(session, cluster),
        "node_groups": cluster_fit.node_groups(session, cluster),
    }


# ---- messages


def _check_cluster(context: Context, cluster: str) -> None:
    clusters = context.settings.clusters
    if not context.settings.has_cluster(cluster):
        detail = (
            f"cluster {cluster[:80]!r} is not configured here; known: {', '.join(clusters)}"
        )
        raise RequestInvalidError.of_field("/cluster", "unknown_name", detail)


def _parse(model: type[Body], body: bytes) -> Body:
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        problems = []
        for item in error.errors(include_url=False):
            pointer = pointer_to(item["loc"])
            problems.append(Problem(pointer, item["type"], plain_message(item)))
        raise RequestInvalidError.of_problems(problems) from error


def _json(message: BaseModel) -> Response:
    return Response(message.model_dump_json(), media_type="application/json")
