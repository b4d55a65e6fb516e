"""Fits a job spec to a cluster: whether it fits, and how it is resolved there.

Owns: `dp: auto`, `accelerator: auto` and default storage of a job. Must not know: HTTP.

Everything that searches for layouts is free of the database, because it may take seconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from megatron_ray.config.checkpoint import StorageConfig
from megatron_ray.config.problem import Problem
from megatron_ray.planning.answers import estimates
from megatron_ray.planning.hardware import Hardware
from megatron_ray.planning.memory import fullest_rank
from megatron_ray.validation import check, resolution
from service.jobs import lifecycle
from service.jobs.capacity import ClusterCapacity, ResourceRequest, resource_request
from service.store.schema import ClusterRow, JobRow
from workers.decisions.elasticity import legal_dps, with_dp
from workers.decisions.topology.alternatives import missing_room, nearest_layout
from workers.decisions.topology.node_rules import NodeRules
from workers.protocol.job import JobSpec
from workers.protocol.states import JobState, StatusReason
from workers.protocol.wire import AgentReport
from workers.protocol.wording import counted

MAX_NODES_NAMED = 8
"""Nodes that a refusal names."""


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


def node_groups(session: Session, cluster: str) -> list[dict[str, Any]]:
    """Returns what the cluster may grow to, as its agent last reported it."""
    row = session.get(ClusterRow, cluster)
    if row is None or row.report is None:
        return []
    # An agent of an earlier version reports none.
    return list(row.report.get("node_groups", ()))


def avoided_nodes(session: Session, cluster: str) -> dict[str, str]:
    """Returns why no job may use some living nodes of a cluster, by node id."""
    row = session.get(ClusterRow, cluster)
    if row is None or row.report is None:
        return {}
    avoided = {}
    # As stored, because a driver that sends records must not wait for thousands of nodes
    # to be validated.
    for node in row.report["nodes"]:
        if node["alive"] and node["storage_ok"] is False:
            avoided[node["node_id"]] = "it cannot read the job storage"
        # Absent in reports that an earlier version has stored.
        elif node["alive"] and node.get("excluded"):
            avoided[node["node_id"]] = node["excluded"]
    return avoided


def check_fit(spec: JobSpec, capacity: ClusterCapacity) -> list[Problem]:
    """Returns why even the empty cluster, grown to its bound, could not hold the job.

    Returns nothing while the cluster is unknown.
    """
    if not capacity.is_known:
        return []
    problems = _check_choice(spec, capacity)
    if problems:
        return problems
    capacity = capacity.among(NodeRules.of(spec))
    request = _smallest_request(spec, capacity)
    # In this order, because each check relies on the previous ones.
    problems = _check_nodes(spec, request, capacity)
    if problems:
        return problems
    for problem in check.find_problems(spec, capacity.max_ranks(request)):
        # The other rules hold wherever the job runs and were checked before.
        if problem.code == "world_fits":
            detail = problem.detail + _nearest_layout(spec, request, capacity)
            problems.append(replace(problem, detail=detail))
    if problems:
        return problems
    return [
        *_check_memory(spec, request, capacity),
        *_check_copies(spec, request, capacity),
    ]


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
    capacity = capacity.among(NodeRules.of(spec))
    request = _smallest_request(spec, capacity)
    if ranks is None:
        ranks = _ranks_for_auto(request, capacity)
    resolved = resolution.resolve(spec, _bounded(spec, ranks))
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
        f"resolved to {counted(resolved.world_size, 'rank')}",
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
        # A spec without a legal size is refused before.
        dp = min(legal_dps(spec), default=resolution.least_dp(spec))
    else:
        dp = parallel.dp
    ranks = parallel.tp * parallel.pp * parallel.cp * dp
    return resource_request(spec, ranks, has_gpus=capacity.has_gpus)


def _bounded(spec: JobSpec, ranks: int) -> int:
    """Returns how many of some ranks a spec may use."""
    if spec.elastic is None:
        return ranks
    return min(ranks, resolution.world_size(with_dp(spec, spec.elastic.max_dp)))


def _ranks_for_auto(request: ResourceRequest, capacity: ClusterCapacity) -> int:
    """Returns the ranks that `dp: auto` may use: those that today's nodes can hold.

    `request` is that of the smallest world, for which an empty cluster may be given nodes:
    a user who has named no number must not be billed for the cluster's bound.
    """
    return max(request.ranks, capacity.max_ranks(request, may_grow=False))


def _check_choice(spec: JobSpec, capacity: ClusterCapacity) -> list[Problem]:
    """Returns why the spec leaves no node to run on."""
    rules = NodeRules.of(spec)
    if capacity.among(rules).nodes:
        return []
    reasons = []
    for node in capacity.nodes[:MAX_NODES_NAMED]:
        reasons.append(f"node {node.address}: {rules.refusal(node)}")
    others = len(capacity.nodes) - len(reasons)
    if others:
        reasons.append(f"and {others} more nodes")
    pointer = "/resources/nodes"
    if not rules.only and not rules.exclude:
        pointer = "/resources/gpu_type"
    if capacity.among(replace(rules, image=None)).nodes:
        pointer = "/image"
    detail = (
        f"no node of cluster {spec.cluster!r} is left for the job ({'; '.join(reasons)}); "
        f"change {pointer[1:].replace('/', '.')} or add nodes"
    )
    return [Problem(pointer, "nodes_left", detail)]


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
        island = f"tp={spec.parallel.tp}"
        pointer = "/parallel/tp"
        # Not even one rank fits: of some custom resource no node has enough.
        if capacity.max_ranks(replace(request, ranks=1, island=1)) == 0:
            request = replace(request, island=1)
            island = "a rank"
            pointer = "/resources"
        detail = (
            f"{island} {missing_room(capacity.nodes, request.demand)}"
            f"{_nearest_layout(spec, request, capacity)}"
        )
        return [Problem(pointer, "island_fits", detail)]
    return []


def _nearest_layout(
    spec: JobSpec, request: ResourceRequest, capacity: ClusterCapacity
) -> str:
    """Returns the end of a sentence that names a layout for the cluster, if there is one."""
    hardware = None
    if request.gpu:
        hardware = capacity.gpu_hardware
    layout = nearest_layout(
        spec,
        capacity.nodes,
        request.demand,
        lambda candidate: _fits_memory(candidate, hardware),
    )
    if layout is None:
        return ""
    return f"; {layout} would fit"


def _fits_memory(spec: JobSpec, hardware: Hardware | None) -> bool:
    """Whether a layout fits into the GPUs' memory, as far as that is known."""
    complete = estimates.with_vocabulary(spec)
    if complete is None or hardware is None or hardware.memory_bytes is None:
        return True
    memory = fullest_rank(complete, hardware.device)
    return memory.total_bytes <= hardware.memory_bytes


def _check_copies(
    spec: JobSpec, request: ResourceRequest, capacity: ClusterCapacity
) -> list[Problem]:
    """Returns why copies of the ranks' states do not fit into any node."""
    if spec.checkpoint.peer_every_steps is None:
        return []
    resolved = resolution.resolve(spec, _ranks_for_auto(request, capacity))
    memory_bytes = capacity.largest_node_memory_bytes
    return estimates.check_copies(resolved, request.island, memory_bytes)


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
