"""From a submitted spec to one that can run.

Owns: what the service itself checks, resolving against the cluster's room.

Pure but for what takes a session. Must not know: HTTP.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from megatron_ray.config.checkpoint import StorageConfig
from megatron_ray.config.problem import Problem
from megatron_ray.validation import check, resolution
from service.jobs import estimates, lifecycle
from service.jobs.capacity import ClusterCapacity, ResourceRequest, need_of
from service.jobs.spec_problems import pointer_to
from service.settings import Settings
from service.store.schema import ClusterRow, JobRow
from workers.protocol.job import JobSpec
from workers.protocol.states import JobState, StatusReason
from workers.protocol.wire import AgentReport


@dataclass(frozen=True)
class Resolved:
    """A spec with nothing left open."""

    spec: JobSpec
    world_size: int


Answer = Resolved | list[Problem]
"""Of a spec and a cluster: how it runs there, or why it cannot."""


def room_of(session: Session, cluster: str) -> ClusterCapacity:
    """The cluster as last reported; empty (`known` is false) before that."""
    row = session.get(ClusterRow, cluster)
    return (
        ClusterCapacity(())
        if row is None or row.report is None
        else ClusterCapacity(AgentReport.model_validate(row.report).nodes)
    )


def check_rules(spec: JobSpec, settings: Settings) -> list[Problem]:
    """What is wrong with a spec wherever it runs."""
    return [
        *_names(spec, settings),
        *_texts(spec.model_dump(mode="json"), ()),
        *_paths(spec),
        *check.find_problems(spec),
    ]


def check_fit(spec: JobSpec, room: ClusterCapacity) -> list[Problem]:
    """Why the cluster cannot hold the job, even when it is empty; nothing while the
    cluster is not known.
    """
    if not room.known:
        return []
    need = _least(spec, room)
    if need.gpu and not room.has_gpus:
        text = (
            f"accelerator=gpu, but no node of cluster {spec.cluster!r} has a GPU; use cpu or "
            "auto, or add nodes"
        )
        return [Problem("/resources/accelerator", "no_gpus", text)]
    if need.cpus_per_rank > room.most_cpus:
        text = (
            f"cpus_per_rank={need.cpus_per_rank:g}, but the largest node has "
            f"{room.most_cpus:g} CPUs; lower it or add nodes"
        )
        return [Problem("/resources/cpus_per_rank", "cpus_fit", text)]
    ranks = room.ranks(need)
    if ranks == 0:
        single = room.ranks(ResourceRequest(1, 1, need.cpus_per_rank, need.gpu))
        text = (
            f"tp={spec.parallel.tp} ranks must share a node, and no node has room for them "
            f"({single} ranks in the whole cluster)"
        )
        return [
            Problem("/parallel/tp", "island_fits", text + "; lower tp or add larger nodes")
        ]
    return [
        problem
        for problem in check.find_problems(spec, ranks)
        if problem.code == "world_fits"
    ] or _check_memory(spec, room)


def _check_memory(spec: JobSpec, room: ClusterCapacity) -> list[Problem]:
    """Whether it fits into the cluster's GPUs, where they are known."""
    need = _least(spec, room)
    device = room.gpu if need.gpu else None
    return (
        estimates.check_memory(resolution.resolve(spec, room.ranks(need)), device)
        if device is not None
        else []
    )


def check_storage(session: Session, spec: JobSpec) -> list[Problem]:
    """Whether another job that is not over writes to the folder asked for: two would
    tear each other's checkpoints and reports.
    """
    if spec.storage is None:
        return []
    wanted = _folder(spec.storage.path)
    for other, job_dir in session.execute(
        sa.select(JobRow.id, JobRow.job_dir).where(JobRow.status.not_in(lifecycle.TERMINAL))
    ):
        if _folder(job_dir) == wanted:
            text = (
                f"{other} is writing to {job_dir}; choose another folder, leave storage out, "
                "or wait for that job's end"
            )
            return [Problem("/storage/path", "in_use", text)]
    return []


def resolve(spec: JobSpec, room: ClusterCapacity, job_dir: str) -> Resolved:
    """Fills dp, sequence parallelism, accelerator and storage.

    An unknown cluster counts as one replica's room, without GPUs.
    """
    need = _least(spec, room)
    full = resolution.resolve(spec, room.ranks(need) if room.known else need.ranks)
    assert isinstance(full, JobSpec)
    accelerator = full.resources.model_copy(
        update={"accelerator": "gpu" if need.gpu else "cpu"}
    )
    full = full.model_copy(
        update={"resources": accelerator, "storage": StorageConfig(path=job_dir)}
    )
    return Resolved(full, resolution.world_size(full))


def unresolved(session: Session, cluster: str) -> dict[str, tuple[JobSpec, str]]:
    """Jobs that came before the cluster was known, with their spec and folder, by id."""
    found = sa.select(JobRow).where(
        JobRow.cluster == cluster,
        JobRow.status == JobState.PREPARING,
        JobRow.world_size.is_(None),
    )
    return {
        job.id: (JobSpec.model_validate(job.resolved_spec), job.job_dir)
        for job in session.scalars(found)
    }


def answer(spec: JobSpec, room: ClusterCapacity, job_dir: str) -> Answer:
    """What becomes of such a job.

    Takes seconds where a layout that fits is searched for, so not for inside a
    transaction.
    """
    return check_fit(spec, room) or resolve(spec, room, job_dir)


def settle(session: Session, cluster: ClusterRow, answers: Mapping[str, Answer]) -> None:
    """The agent has spoken: nobody waits for it any more, and jobs that came before the
    cluster was known are resolved.

    Those that the cluster cannot hold end with a problem; one that came since the
    `answers` were found waits for the next report.
    """
    room = room_of(session, cluster.name)
    if not room.known:
        return
    preparing = JobRow.cluster == cluster.name, JobRow.status == JobState.PREPARING
    waiting = (
        JobRow.status_reason == StatusReason.WAITING_AGENT,
        JobRow.world_size.is_not(None),
    )
    for job in session.scalars(sa.select(JobRow).where(*preparing, *waiting)):
        job.status_reason = StatusReason.PREPARING_DATA
        job.message = ""
    for job in session.scalars(
        sa.select(JobRow)
        .where(*preparing, JobRow.world_size.is_(None))
        .order_by(JobRow.number)
    ):
        found = answers.get(job.id)
        if found is None:
            continue
        if not isinstance(found, Resolved):
            lifecycle.fail(
                session,
                job,
                found,
                lifecycle.NewEvent(
                    "job.failed", "the cluster cannot hold the job", "error"
                ),
            )
            continue
        job.resolved_spec = found.spec.model_dump(mode="json")
        job.world_size = found.world_size
        job.status_reason = StatusReason.PREPARING_DATA
        job.message = ""
        text = f"resolved to {found.world_size} ranks"
        lifecycle.add_event(
            session,
            job,
            lifecycle.NewEvent("job.resolved", text, data={"world_size": found.world_size}),
        )
        lifecycle.changed(session, job)


def _least(spec: JobSpec, room: ClusterCapacity) -> ResourceRequest:
    parallel = spec.parallel
    dp = resolution.least_dp(spec) if parallel.dp == "auto" else parallel.dp
    return need_of(
        spec, parallel.tp * parallel.pp * parallel.cp * dp, has_gpus=room.has_gpus
    )


def _names(spec: JobSpec, settings: Settings) -> list[Problem]:
    found = []
    for name, given, allowed in (
        ("cluster", (spec.cluster,), settings.clusters),
        ("image", (spec.image,), settings.images),
        ("credentials", spec.credentials, settings.credentials),
    ):
        for index, value in enumerate(given):
            if value not in allowed:
                known = (
                    f"known: {', '.join(allowed)}"
                    if allowed
                    else "none is set up here; leave it out"
                )
                pointer = f"/{name}/{index}" if name == "credentials" else f"/{name}"
                found.append(
                    Problem(
                        pointer,
                        "unknown_name",
                        f"{name} {value[:80]!r} is not set up here; {known}",
                    )
                )
    return found


def _texts(node: Any, parts: tuple[str | int, ...]) -> list[Problem]:
    if isinstance(node, str) and "\0" in node:
        return [
            Problem(
                pointer_to(parts),
                "nul_character",
                "text may not contain NUL characters; remove them",
            )
        ]
    if isinstance(node, dict):
        keys = (
            [
                Problem(
                    pointer_to(parts),
                    "nul_character",
                    "keys may not contain NUL characters; remove them",
                )
            ]
            if "\0" in "".join(node)
            else []
        )
        return keys + [
            problem
            for key, value in node.items()
            for problem in _texts(value, (*parts, key))
        ]
    if isinstance(node, list):
        return [
            problem
            for index, value in enumerate(node)
            for problem in _texts(value, (*parts, index))
        ]
    return []


def _folder(path: str) -> str:
    """One spelling of a folder or URI."""
    scheme, separator, rest = path.removeprefix("file://").rpartition("://")
    spelt = str(PurePosixPath(rest))
    return f"{scheme}://{spelt}" if separator else "/" + spelt.lstrip("/")


def _paths(spec: JobSpec) -> list[Problem]:
    given = {
        "/storage/path": "" if spec.storage is None else spec.storage.path,
        "/checkpoint/start_from": spec.checkpoint.start_from,
    }
    return [
        problem
        for pointer, path in given.items()
        if path and "://" not in path
        for problem in _absolute(pointer, path)
    ]


def _absolute(pointer: str, path: str) -> list[Problem]:
    if not path.startswith("/"):
        text = (
            f"{path[:80]!r} is relative, and nodes share no working directory; give an "
            "absolute path or a URI, or leave it out"
        )
        return [Problem(pointer, "absolute", text)]
    if ".." in PurePosixPath(path).parts:
        return [
            Problem(pointer, "absolute", f"{path[:80]!r} contains '..'; write the path out")
        ]
    return []
