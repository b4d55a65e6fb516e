"""A submission's way in.

Owns: the order of checks, asking the agent, making the row. Must not know: HTTP.

Nothing is stored before everything that can be checked has been: a refused spec leaves
no trace.
"""

import secrets
import time
from dataclasses import dataclass
from typing import Any

from starlette.concurrency import run_in_threadpool

from megatron_ray.config.problem import Problem
from service.api import render
from service.http.dependencies import Context
from service.http.errors import spec_invalid
from service.http.idempotency import IdempotentRequest
from service.jobs import lifecycle, submissions
from service.jobs.capacity import ClusterCapacity
from service.store.schema import JobRow
from workers.protocol.job import JobSpec

_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"


@dataclass(frozen=True)
class Answer:
    """What a submission is told."""

    status: int
    body: dict[str, Any]
    replayed: bool = False
    """The same request had been answered before."""


def new_job_id() -> str:
    """60 random bits, readable."""
    return "job-" + "".join(secrets.choice(_ALPHABET) for _ in range(12))


async def submit(
    context: Context, spec: JobSpec, given: dict[str, Any], repeat: IdempotentRequest
) -> Answer:
    """Makes a job.

    Raises ProblemError spec_invalid with everything wrong at once,
    idempotency_key_reused.
    """
    earlier, room, taken = await run_in_threadpool(_look, context, spec, repeat)
    if earlier is not None:
        return earlier
    problems = [*await run_in_threadpool(check, context, spec, room), *taken]
    if problems:
        raise spec_invalid(problems)
    job_id = new_job_id()
    job_dir = (
        spec.storage.path
        if spec.storage is not None
        else str(context.settings.data_dir / "jobs" / job_id)
    )
    problems = await ask_agent(context, spec, room, job_dir) or []
    if problems:
        raise spec_invalid(problems)
    row = JobRow(
        id=job_id,
        name=spec.name,
        cluster=spec.cluster,
        priority=spec.priority,
        created_at=time.time(),
        job_dir=job_dir,
        spec=given,
    )
    if room.known:
        found = submissions.resolve(spec, room, job_dir)
        row.resolved_spec = found.spec.model_dump(mode="json")
        row.world_size = found.world_size
    else:
        row.resolved_spec = spec.model_dump(mode="json")
        row.world_size = None
    answer = await run_in_threadpool(_store, context, spec, row, repeat)
    if not answer.replayed:
        context.telemetry.jobs_created.inc()
    return answer


def check(context: Context, spec: JobSpec, room: ClusterCapacity) -> list[Problem]:
    """What the service can see by itself; whether it fits is only asked once everything
    else is right.
    """
    return submissions.check_rules(spec, context.settings) or submissions.check_fit(
        spec, room
    )


async def ask_agent(
    context: Context, spec: JobSpec, room: ClusterCapacity, job_dir: str
) -> list[Problem] | None:
    """What a look from inside the cluster finds wrong with the paths; None when no
    agent answers in time.
    """
    if not context.agents.is_live(spec.cluster) or not room.known:
        return None
    resolved = submissions.resolve(spec, room, job_dir).spec.model_dump(mode="json")
    question = context.agents.ask(spec.cluster, resolved, job_dir)
    await run_in_threadpool(_raise_revision, context, spec.cluster)
    found = await question.answer(context.settings.check_wait_s)
    return None if found is None else list(found)


def _raise_revision(context: Context, cluster: str) -> None:
    with context.store.write() as session:
        lifecycle.raise_revision(session, cluster)


def _look(
    context: Context, spec: JobSpec, repeat: IdempotentRequest
) -> tuple[Answer | None, ClusterCapacity, list[Problem]]:
    with context.store.read() as session:
        earlier = repeat.earlier(session)
        answer = Answer(*earlier, replayed=True) if earlier else None
        return (
            answer,
            submissions.room_of(session, spec.cluster),
            submissions.check_storage(session, spec),
        )


def _store(
    context: Context, spec: JobSpec, row: JobRow, repeat: IdempotentRequest
) -> Answer:
    with context.store.write() as session:
        lifecycle.lock_cluster(session, row.cluster)
        earlier = repeat.earlier(session)
        if earlier is not None:
            return Answer(*earlier, replayed=True)
        taken = submissions.check_storage(
            session, spec
        )  # again: another may have come in the meantime
        if taken:
            raise spec_invalid(taken)
        lifecycle.create(
            session,
            row,
            spec.metadata,
            known=row.world_size is not None and context.agents.is_live(row.cluster),
        )
        session.flush()
        body = render.job(session, row).model_dump(mode="json")
        repeat.remember(session, 201, body)
        return Answer(201, body)
