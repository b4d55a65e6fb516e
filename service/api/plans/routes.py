"""Serves /v1/plans: how a job would run, without starting anything."""

import json
from functools import partial
from typing import Annotated, Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Query, Response
from pydantic import Field
from starlette.concurrency import run_in_threadpool

from megatron_ray.config.problem import Problem
from megatron_ray.planning.answers import estimates, without_cluster
from megatron_ray.planning.answers.bodies import plan_body, suggestions_body
from megatron_ray.planning.hardware import HARDWARE, Hardware, hardware_named
from megatron_ray.validation import check
from service.api.plans.bodies import (
    Plan,
    Suggestions,
)
from service.exceptions import RequestInvalidError, SpecInvalidError, bounded
from service.http.bodies import BoundedBodyRoute
from service.http.dependencies import Context, ContextDep
from service.http.parameters import WRITTEN_NUMBER, check_query
from service.jobs import cluster_fit, spec_checks
from service.jobs.agents import CheckedPaths
from service.jobs.capacity import ClusterCapacity, resolved_request
from service.jobs.cluster_fit import ResolvedSpec
from service.jobs.submit import Submitter
from service.settings import Settings
from workers.decisions.cluster_growth import describe_nodes
from workers.decisions.topology.node_rules import NodeRules
from workers.protocol.job import JobSpec
from workers.protocol.spec_warnings import export_notes

RANKS_PER_PART = 2048
"""Ranks that are encoded at once."""
EXAMPLE_JOB_ID = "job-example"
"""Names the default folder of a job that does not exist."""
router = APIRouter(
    prefix="/v1",
    tags=["plans"],
    dependencies=[Depends(check_query)],
    route_class=BoundedBodyRoute,
)
HardwareName = Annotated[
    str | None,
    Query(
        description="Device to estimate the time for, and whose memory is the limit: A100, "
        "H100, H200, B200 or CPU. Default: the cluster's device."
    ),
]
NumRanks = Annotated[
    int | None,
    Field(ge=1, le=estimates.MAX_RANKS),
    WRITTEN_NUMBER,
    Query(
        description="Number of ranks. Default: as many as the job would get.",
    ),
]


@router.post("/plans", response_model=Plan)
async def create_plan(
    spec: JobSpec,
    context: ContextDep,
    hardware: HardwareName = None,
    ranks: NumRanks = None,
) -> Response:
    """Returns the plan of a job: resolved spec, ranks, memory, communication, step time.

    The body is a job spec. Invalid specs get 422; valid ones that do not fit in the
    cluster list the reasons in `problems`. With `hardware` or `ranks` the plan is for
    devices that the cluster need not have: only memory and layout are judged.
    """
    requested = _requested_hardware(hardware)
    capacity = await _check_spec(context, spec, ranks)
    submitter = _submitter(context)
    job_dir = submitter.job_dir(spec, EXAMPLE_JOB_ID)
    # In threads: they count every weight and rank, and may search for a layout that fits.
    resolve = partial(
        cluster_fit.resolve, spec, capacity, job_dir, hardware=requested, ranks=ranks
    )
    resolved = await run_sync(resolve, limiter=context.compute)
    too_large = estimates.size_problems(resolved.world_size)
    if too_large:
        raise SpecInvalidError(too_large)
    # The agent looks at the spec's paths, as it does for a submission.
    checked = await submitter.check_paths(spec, capacity, job_dir)
    if requested is None and ranks is None:
        build = partial(_cluster_plan, spec, resolved, capacity, checked)
    else:
        build = partial(
            without_cluster.device_plan,
            resolved.spec,
            requested or _device_of(spec, resolved.spec, capacity),
            ranks,
            problems=_path_problems(checked),
            notes=[
                "the cluster was not looked at",
                *_path_notes(checked),
                *export_notes(spec),
            ],
        )
    text = await run_sync(lambda: _plan_json(build()), limiter=context.compute)
    return Response(text, media_type="application/json")


@router.post("/plans/suggest")
async def suggest_layouts(
    spec: JobSpec,
    context: ContextDep,
    hardware: HardwareName = None,
    ranks: NumRanks = None,
) -> Suggestions:
    """Returns the fastest layouts that fit.

    Tries tp, pp, vpp, cp, ep, dp, micro batch size and recomputation. All other fields
    stay as in the spec.
    """
    requested = _requested_hardware(hardware)
    capacity = await _check_spec(context, spec)
    job_dir = _submitter(context).job_dir(spec, EXAMPLE_JOB_ID)
    resolve = partial(cluster_fit.resolve, spec, capacity, job_dir)
    resolved = await run_sync(resolve, limiter=context.compute)
    device = requested or _device_of(spec, resolved.spec, capacity)
    if device is None:
        raise _wrong_hardware("the cluster's device is unknown; set hardware")
    # Without a number: what the spec gets on the cluster, or needs at least.
    world_size = ranks or resolved.world_size
    notes = []
    if ranks is None and not capacity.is_known:
        notes.append(
            f"cluster {spec.cluster!r} has not been reported yet: {world_size} ranks is the "
            "least that the job needs; set ranks"
        )
    build = partial(suggestions_body, resolved.spec, world_size, device, notes)
    body = await run_sync(build, limiter=context.compute)
    return Suggestions(**body)


def _plan_json(body: dict[str, Any]) -> str:
    """Returns a plan as JSON, of which the ranks are the most by far."""
    ranks = []
    # In parts: the event loop waits for the encoder of one part, not of megabytes.
    for first in range(0, len(body["ranks"]), RANKS_PER_PART):
        part = json.dumps(body["ranks"][first : first + RANKS_PER_PART])
        ranks.append(part[1:-1])
    rest = Plan(**body | {"ranks": []}).model_dump_json(exclude={"ranks"})
    return f'{rest[:-1]},"ranks":[{",".join(ranks)}]}}'


def _cluster_plan(
    spec: JobSpec,
    resolved: ResolvedSpec,
    capacity: ClusterCapacity,
    checked: CheckedPaths | None,
) -> dict[str, Any]:
    """Returns the plan for the spec's cluster; `checked` is None if paths were not checked."""
    unfit = cluster_fit.check_fit(spec, capacity)
    fits: bool | None = False
    if not unfit:
        fits = capacity.is_known or None
    return plan_body(
        resolved.spec,
        _device_of(spec, resolved.spec, capacity),
        fits=fits,
        room=_room(capacity, resolved),
        new_nodes=_new_nodes(capacity, resolved),
        problems=[*unfit, *_path_problems(checked)],
        notes=[
            *_cluster_notes(spec, resolved, capacity),
            *_path_notes(checked),
            *export_notes(spec),
        ],
    )


# ---- checks


def _submitter(context: Context) -> Submitter:
    return Submitter(context.settings, context.store, context.agents, context.compute)


async def _check_spec(
    context: Context, spec: JobSpec, ranks: int | None = None
) -> ClusterCapacity:
    """Returns the capacity of the spec's cluster.

    Raises SpecInvalidError for a spec that is wrong wherever it runs, or that
    needs more than `ranks`.
    """
    capacity, taken = await run_in_threadpool(_submitter(context).read_cluster, spec)
    check_rules = partial(_rule_problems, spec, context.settings, ranks)
    problems = [*await run_sync(check_rules, limiter=context.compute), *taken]
    if problems:
        raise SpecInvalidError(problems)
    return capacity


def _rule_problems(spec: JobSpec, settings: Settings, ranks: int | None) -> list[Problem]:
    problems = spec_checks.check_rules(spec, settings)
    # Only the rule that needs the number of ranks can be violated after the others.
    return problems or check.find_problems(spec, ranks)


# ---- devices


def _requested_hardware(name: str | None) -> Hardware | None:
    if name is None:
        return None
    hardware = hardware_named(name)
    if hardware is None:
        raise _wrong_hardware(without_cluster.unknown_hardware(name))
    return hardware


def _wrong_hardware(detail: str) -> RequestInvalidError:
    return RequestInvalidError.of_field("/query/hardware", "unknown_hardware", detail)


def _device_of(
    spec: JobSpec, resolved: JobSpec, capacity: ClusterCapacity
) -> Hardware | None:
    """Returns the device that the job would run on; None while it is unknown."""
    if resolved.resources.accelerator == "gpu":
        return capacity.among(NodeRules.of(spec)).gpu_hardware
    # An unknown cluster resolves `auto` to cpu, whatever its devices are.
    if capacity.is_known or spec.resources.accelerator == "cpu":
        return HARDWARE["CPU"]
    return None


# ---- the cluster


def _room(capacity: ClusterCapacity, resolved: ResolvedSpec) -> int | None:
    if not capacity.is_known:
        return None
    return capacity.max_ranks(resolved_request(resolved.spec), may_grow=False)


def _new_nodes(capacity: ClusterCapacity, resolved: ResolvedSpec) -> dict[str, int]:
    """Returns how many nodes of each group the job needs beside today's."""
    request = resolved_request(resolved.spec)
    # What does not fit in any case is a problem of the plan.
    if capacity.max_ranks(request) < request.ranks:
        return {}
    return capacity.new_nodes(request)


def _cluster_notes(
    spec: JobSpec, resolved: ResolvedSpec, capacity: ClusterCapacity
) -> list[str]:
    if not capacity.is_known:
        return [
            f"cluster {spec.cluster!r} has not been reported yet: it is unknown whether the "
            "job fits; dp: auto counts as 1, and no GPUs are assumed"
        ]
    notes = []
    new_nodes = _new_nodes(capacity, resolved)
    if new_nodes:
        counts = describe_nodes(new_nodes, "more node", of="of group")
        verb = "are"
        if sum(new_nodes.values()) == 1:
            verb = "is"
        limit_s = spec.resources.placement_timeout_s
        notes.append(
            f"fits when {counts} {verb} there; the job waits for them up to "
            f"resources.placement_timeout_s={limit_s:g} s at a time"
        )
    return notes


def _path_problems(checked: CheckedPaths | None) -> tuple[Problem, ...]:
    if checked is None:
        return ()
    return bounded(checked.problems)


def _path_notes(checked: CheckedPaths | None) -> tuple[str, ...]:
    if checked is None:
        return ("paths were not checked: no agent answered",)
    return checked.notes
