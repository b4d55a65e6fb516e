"""Fits a job spec to a cluster: whether it fits, and how it is resolved there.

Owns: `dp: auto`, `accelerator: auto` and default storage of a job. Must not know: HTTP.

Everything that searches for layouts is free of the database, because it may take seconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

from megatron_ray.config.checkpoint import StorageConfig
from megatron_ray.config.problem import Problem
from megatron_ray.planning.answers import estimates
from megatron_ray.planning.hardware import Hardware
from megatron_ray.validation import check, resolution
from service.jobs import lifecycle
from service.jobs.capacity import ClusterCapacity, ResourceRequest, resource_request
from service.store.schema import ClusterRow, JobRow
from workers.protocol.job import JobSpec
from workers.protocol.states import JobState, StatusReason
from workers.protocol.wire import AgentReport


@dataclass(frozen=True)
class ResolvedSpec:
    """A spec in which every `auto` and default is filled in."""

    spec: JobSpec
    world_size: int


@dataclass(frozen=True)
class WaitingJob:
    """A job that was submitted before its cluster was known."""

    spec: JobSpec
    job_dir: str


Resolution = ResolvedSpec | list[Problem]
"""How a spec runs on a cluster, or why it cannot."""


def capacity_of(session: Session, cluster: str) -> ClusterCapacity:
    """Returns the capacity of the cluster as last reported; unknown before that."""
    row = session.get(ClusterRow, cluster)
    if row is None or row.report is None:
        return ClusterCapacity(())
    report = AgentReport.model_validate(row.report)
    return ClusterCapacity(report.nodes, report.node_groups)


def may_grow(session: Session, cluster: str) -> bool:
    """Returns whether an autoscaler may give nodes to the cluster."""
    row = session.get(ClusterRow, cluster)
    return row is not None and bool((row.report or {}).get("node_groups"))


def check_fit(spec: JobSpec, capacity: ClusterCapacity) -> list[Problem]:
    """Returns why even the empty cluster, grown to its bound, could not hold the job.

    Returns nothing while the cluster is unknown.
    """
    if not capacity.is_known:
        return []
    request = _smallest_request(spec, capacity)
    # In this order, because each check relies on the previous ones.
    problems = _check_nodes(spec, request, capacity)
    if problems:
        return problems
    for problem in check.find_problems(spec, capacity.max_ranks(request)):
        # The other rules hold wherever the job runs and were checked before.
        if problem.code == "world_fits":
            problems.append(problem)
    return problems or _check_memory(spec, request, capacity)


def resolve(
    spec: JobSpec,
    capacity: ClusterCapacity,
    job_dir: str,
    *,
    hardware: Hardware | None = None,
    ranks: int | None = None,
) -> ResolvedSpec:
    """Fills in dp, sequence parallelism, accelerator and storage.

    An unknown cluster counts as one that has room for one replica and no GPUs.
    `hardware` and `ranks` stand for the cluster's device and room.
    """
    request = _smallest_request(spec, capacity)
    if ranks is None:
        ranks = _ranks_for_auto(request, capacity)
    resolved = resolution.resolve(spec, ranks)
    assert isinstance(resolved, JobSpec)
    has_gpu = request.gpu
    if hardware is not None and spec.resources.accelerator == "auto":
        has_gpu = hardware.device.type == "cuda"
    accelerator = "cpu"
    if has_gpu:
        accelerator = "gpu"
    resources = resolved.resources.model_copy(update={"accelerator": accelerator})
    storage = StorageConfig(path=job_dir)
    resolved = resolved.model_copy(update={"resources": resources, "storage": storage})
    return ResolvedSpec(resolved, resolution.world_size(resolved))


# ---- jobs that were submitted before the cluster was known


def jobs_waiting_for_cluster(session: Session, cluster: str) -> dict[str, WaitingJob]:
    """Returns the jobs that wait for the cluster's first report, by id."""
    waiting = {}
    for job in session.scalars(_unresolved(cluster)):
        spec = JobSpec.model_validate(job.resolved_spec)
        waiting[job.id] = WaitingJob(spec, job.job_dir)
    return waiting


def check_and_resolve(job: WaitingJob, capacity: ClusterCapacity) -> Resolution:
    """Returns a waiting job's resolved spec, or the reasons why it cannot run.

    Takes seconds when it searches for a layout that fits, so it must not be called inside
    a transaction.
    """
    return check_fit(job.spec, capacity) or resolve(job.spec, capacity, job.job_dir)


def resolve_waiting_jobs(
    session: Session, cluster: ClusterRow, resolutions: Mapping[str, Resolution]
) -> None:
    """Resolves the jobs that waited for the cluster's report; fails those that do not fit.

    `resolutions` holds the result of `check_and_resolve` by job id. A job that was
    submitted since they were computed waits for the next report.
    """
    if not capacity_of(session, cluster.name).is_known:
        return
    # Other jobs were resolved when submitted and only waited for the agent to be back.
    agent_awaited = sa.select(JobRow).where(
        JobRow.cluster == cluster.name,
        JobRow.status == JobState.PREPARING,
        JobRow.status_reason == StatusReason.WAITING_AGENT,
        JobRow.world_size.is_not(None),
    )
    for job in session.scalars(agent_awaited):
        _set_preparing(job)
    for job in session.scalars(_unresolved(cluster.name).order_by(JobRow.number)):
        # In the order of submission, which is also the order of their events.
        result = resolutions.get(job.id)
        if isinstance(result, ResolvedSpec):
            _set_resolved(session, job, result)
        elif result is not None:
            event = lifecycle.NewEvent(
                "job.failed", "the cluster cannot hold the job", "error"
            )
            lifecycle.fail(session, job, result, event)


def _unresolved(cluster: str) -> sa.Select[JobRow]:
    return sa.select(JobRow).where(
        JobRow.cluster == cluster,
        JobRow.status == JobState.PREPARING,
        JobRow.world_size.is_(None),
    )


def _set_resolved(session: Session, job: JobRow, resolved: ResolvedSpec) -> None:
    job.resolved_spec = resolved.spec.model_dump(mode="json")
    job.world_size = resolved.world_size
    _set_preparing(job)
    event = lifecycle.NewEvent(
        "job.resolved",
        f"resolved to {resolved.world_size} ranks",
        data={"world_size": resolved.world_size},
    )
    lifecycle.add_event(session, job, event)
    lifecycle.desired_changed(session, job)


def _set_preparing(job: JobRow) -> None:
    job.status_reason = StatusReason.PREPARING_DATA
    job.message = ""


# ---- parts of check_fit


def _smallest_request(spec: JobSpec, capacity: ClusterCapacity) -> ResourceRequest:
    """Returns the resources of the smallest world that can run the spec."""
    parallel = spec.parallel
    if parallel.dp == "auto":
        dp = resolution.least_dp(spec)
    else:
        dp = parallel.dp
    ranks = parallel.tp * parallel.pp * parallel.cp * dp
    return resource_request(spec, ranks, has_gpus=capacity.has_gpus)


def _ranks_for_auto(request: ResourceRequest, capacity: ClusterCapacity) -> int:
    """Returns the ranks that `dp: auto` may use: those that today's nodes can hold.

    `request` is that of the smallest world, for which an empty cluster may be given nodes:
    a user who has named no number must not be billed for the cluster's bound.
    """
    return max(request.ranks, capacity.max_ranks(request, may_grow=False))


def _check_nodes(
    spec: JobSpec, request: ResourceRequest, capacity: ClusterCapacity
) -> list[Problem]:
    """Returns why no node can hold even one island of the job."""
    if request.gpu and not capacity.has_gpus:
        detail = (
            f"accelerator=gpu, but no node of cluster {spec.cluster!r} has a GPU; use cpu or "
            "auto, or add nodes"
        )
        return [Problem("/resources/accelerator", "no_gpus", detail)]
    if request.cpus_per_rank > capacity.largest_node_cpus:
        detail = (
            f"cpus_per_rank={request.cpus_per_rank:g}, but the largest node has "
            f"{capacity.largest_node_cpus:g} CPUs; lower it or add nodes"
        )
        return [Problem("/resources/cpus_per_rank", "cpus_fit", detail)]
    # Nodes may be large enough in sum and still too small one by one.
    if capacity.max_ranks(request) == 0:
        single = ResourceRequest(1, 1, request.cpus_per_rank, request.gpu)
        detail = (
            f"tp={spec.parallel.tp} ranks must share a node, and no node has room for them "
            f"({capacity.max_ranks(single)} ranks in the whole cluster); lower tp or add "
            "larger nodes"
        )
        return [Problem("/parallel/tp", "island_fits", detail)]
    return []


def _check_memory(
    spec: JobSpec, request: ResourceRequest, capacity: ClusterCapacity
) -> list[Problem]:
    """Returns why the job does not fit into the memory of the cluster's GPUs."""
    hardware = capacity.gpu_hardware
    if not request.gpu or hardware is None:
        return []
    # Resolved, because memory depends on dp and on everything that `auto` stands for.
    resolved = resolution.resolve(spec, _ranks_for_auto(request, capacity))
    return estimates.check_memory(resolved, hardware)
