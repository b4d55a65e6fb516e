"""Serves /v1/plans: how a job would run, without starting anything."""

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from starlette.concurrency import run_in_threadpool

from megatron_ray.config.problem import Problem
from megatron_ray.planning.hardware import HARDWARE, Hardware, hardware_named
from megatron_ray.planning.suggest import Suggestion, suggest
from megatron_ray.planning.tally import Tally
from service.api.plan_models import (
    Plan,
    PlanMemory,
    PlanRank,
    PlanSuggestion,
    PlanTime,
    PlanTraffic,
    Suggestions,
)
from service.exceptions import RequestInvalidError, SpecInvalidError
from service.http.dependencies import Context, ContextDep
from service.http.parameters import check_query
from service.jobs import cluster_fit, estimates, spec_checks
from service.jobs.capacity import ClusterCapacity, resource_request
from service.jobs.cluster_fit import ResolvedSpec
from service.jobs.estimates import Estimates
from service.jobs.submit import Submitter
from workers.protocol.job import JobSpec

MAX_RANKS = 65536
EXAMPLE_JOB_ID = "job-example"
"""Names the default folder of a job that does not exist."""
router = APIRouter(prefix="/v1", tags=["plans"], dependencies=[Depends(check_query)])
HardwareName = Annotated[
    str | None,
    Query(
        description="Device to estimate the time for, and whose memory is the limit: A100, "
        "H100, H200, B200 or CPU. Default: the cluster's device."
    ),
]
NumRanks = Annotated[
    int | None,
    Query(
        ge=1,
        le=MAX_RANKS,
        description="Number of ranks. Default: as many as the job would get.",
    ),
]


@router.post("/plans")
async def create_plan(
    spec: JobSpec, context: ContextDep, hardware: HardwareName = None
) -> Plan:
    """Returns the plan of a job: resolved spec, ranks, memory, communication, step time.

    The body is a job spec. Invalid specs get 422; valid ones that do not fit in the
    cluster list the reasons in `problems`.
    """
    requested = _requested_hardware(hardware)
    capacity = await _check_spec(context, spec)
    submitter = _submitter(context)
    job_dir = submitter.job_dir(spec, EXAMPLE_JOB_ID)
    resolved = cluster_fit.resolve(spec, capacity, job_dir)
    _check_num_ranks(resolved.world_size)
    device = requested or _device_of(spec, resolved.spec, capacity)
    # In threads: they count every weight, and may search for a layout that fits.
    unfit = await run_in_threadpool(_unfit, spec, resolved.spec, capacity, requested)
    # The agent looks at the spec's paths, as it does for a submission.
    path_problems = await submitter.check_paths(spec, capacity, job_dir)
    estimate = await run_in_threadpool(estimates.estimates, resolved.spec, device)
    notes = [
        *_cluster_notes(spec, capacity, are_paths_checked=path_problems is not None),
        *_estimate_notes(spec, device, estimate),
    ]
    # model_construct: thousands of ranks that were just made need no validation.
    ranks = [PlanRank.model_construct(**rank) for rank in estimates.rank_map(resolved.spec)]
    return Plan(
        resolved_spec=resolved.spec.model_dump(mode="json"),
        world_size=resolved.world_size,
        ranks=ranks,
        hardware=device and device.name,
        fits=_fits(capacity, unfit),
        room=_room(capacity, resolved),
        problems=[*unfit, *(path_problems or ())],
        notes=notes,
        **_estimated(estimate),
    )


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
    resolved = cluster_fit.resolve(spec, capacity, job_dir)
    device = requested or _device_of(spec, resolved.spec, capacity)
    if device is None:
        raise _wrong_hardware("the cluster's device is unknown; set hardware")
    # Without a number: what the spec gets on the cluster, or needs at least.
    world_size = ranks or resolved.world_size
    config = estimates.with_vocabulary(resolved.spec)
    notes = []
    layouts: list[Suggestion] = []
    # Memory cannot be computed without a vocabulary, so no layout can be judged.
    if config is None:
        notes.append(
            "no estimate before the tokenizer's file is read; set model.vocab_size"
        )
    else:
        layouts = await run_in_threadpool(suggest, config, world_size, device)
        if config.training.precision not in device.efficiencies:
            notes.append(
                f"no {config.training.precision} timings for {device.name}; use another "
                "device or precision"
            )
    if ranks is None and not capacity.is_known:
        notes.append(
            f"cluster {spec.cluster!r} has not been reported yet: {world_size} ranks is the "
            "least that the job needs; set ranks"
        )
    if not layouts and not notes:
        notes.append(
            f"no layout that was tried fits on {world_size} ranks; use more ranks, zero=3 "
            "or a smaller model"
        )
    return Suggestions(
        world_size=world_size,
        hardware=device.name,
        data=[_suggestion(layout) for layout in layouts],
        notes=notes,
    )


# ---- checks


def _submitter(context: Context) -> Submitter:
    return Submitter(context.settings, context.store, context.agents)


async def _check_spec(context: Context, spec: JobSpec) -> ClusterCapacity:
    """Returns the capacity of the spec's cluster.

    Raises SpecInvalidError for a spec that is wrong wherever it runs.
    """
    capacity, taken = await run_in_threadpool(_submitter(context).read_cluster, spec)
    problems = [*spec_checks.check_rules(spec, context.settings), *taken]
    if problems:
        raise SpecInvalidError(problems)
    return capacity


def _unfit(
    spec: JobSpec,
    resolved: JobSpec,
    capacity: ClusterCapacity,
    requested: Hardware | None,
) -> list[Problem]:
    """Returns why the job does not fit.

    The memory that counts is that of the requested device, else that of the cluster's.
    """
    problems = cluster_fit.check_fit(spec, capacity)
    if requested is None:
        return problems
    # The cluster's own device is ignored when another one was requested.
    others = [problem for problem in problems if problem.code != "memory_fits"]
    return others or estimates.check_memory(resolved, requested)


def _check_num_ranks(num_ranks: int) -> None:
    if num_ranks > MAX_RANKS:
        detail = (
            f"a plan lists at most {MAX_RANKS} ranks, and this one has {num_ranks}; lower a "
            "degree"
        )
        raise SpecInvalidError([Problem("/parallel", "too_many_ranks", detail)])


# ---- devices


def _requested_hardware(name: str | None) -> Hardware | None:
    if name is None:
        return None
    hardware = hardware_named(name)
    if hardware is None:
        known = ", ".join(HARDWARE)
        raise _wrong_hardware(f"unknown hardware {name[:80]!r}; known: {known}")
    return hardware


def _wrong_hardware(detail: str) -> RequestInvalidError:
    return RequestInvalidError.of_field("/query/hardware", "unknown_hardware", detail)


def _device_of(
    spec: JobSpec, resolved: JobSpec, capacity: ClusterCapacity
) -> Hardware | None:
    """Returns the device that the job would run on; None while it is unknown."""
    if resolved.resources.accelerator == "gpu":
        return capacity.gpu_hardware
    # An unknown cluster resolves `auto` to cpu, whatever its devices are.
    if capacity.is_known or spec.resources.accelerator == "cpu":
        return HARDWARE["CPU"]
    return None


# ---- bodies


def _fits(capacity: ClusterCapacity, unfit: list[Problem]) -> bool | None:
    # A requested device can be too small even while the cluster is unknown.
    if unfit:
        return False
    return capacity.is_known or None


def _room(capacity: ClusterCapacity, resolved: ResolvedSpec) -> int | None:
    if not capacity.is_known:
        return None
    # The accelerator is resolved already, so `has_gpus` plays no part.
    request = resource_request(resolved.spec, resolved.world_size, has_gpus=False)
    return capacity.max_ranks(request)


def _estimated(estimate: Estimates | None) -> dict[str, Any]:
    """Returns the fields of a plan that are estimated; None for those that cannot be."""
    fields: dict[str, Any] = dict.fromkeys(
        ("memory", "communication", "bubble_share", "time")
    )
    if estimate is None:
        return fields
    fields["memory"] = PlanMemory(
        **asdict(estimate.memory),
        total_bytes_estimate=estimate.memory.total_bytes,
        vocab_size=estimate.vocab_size,
    )
    fields["bubble_share"] = estimate.bubble_share
    if estimate.communication is not None:
        fields["communication"] = _traffic(estimate.communication)
    if estimate.time is not None:
        fields["time"] = PlanTime(**asdict(estimate.time))
    return fields


def _traffic(tally: Tally) -> list[PlanTraffic]:
    entries = []
    for (axis, kind), size in tally.bytes.items():
        operations = tally.operations[axis, kind]
        entry = PlanTraffic(axis=axis, kind=kind, operations=operations, bytes=size)
        entries.append(entry)
    return entries


def _suggestion(layout: Suggestion) -> PlanSuggestion:
    return PlanSuggestion(
        changes=layout.changes,
        total_bytes_estimate=layout.memory.total_bytes,
        time=PlanTime(**asdict(layout.time)),
    )


# ---- notes


def _cluster_notes(
    spec: JobSpec, capacity: ClusterCapacity, *, are_paths_checked: bool
) -> list[str]:
    notes = []
    if not capacity.is_known:
        notes.append(
            f"cluster {spec.cluster!r} has not been reported yet: it is unknown whether the "
            "job fits; dp: auto counts as 1, and no GPUs are assumed"
        )
    if not are_paths_checked:
        notes.append("paths were not checked: no agent answered")
    return notes


def _estimate_notes(
    spec: JobSpec, device: Hardware | None, estimate: Estimates | None
) -> list[str]:
    if estimate is None:
        return [
            "no memory estimate before the tokenizer's file is read; set model.vocab_size"
        ]
    notes = []
    # Each note belongs to a field of the plan that is null.
    if estimate.communication is None:
        notes.append("communication is not counted with zero=3, where torch does it")
    if device is None:
        notes.append("memory is estimated for GPUs: the cluster's device is unknown")
        notes.append("no time estimate: the cluster's device is unknown; set hardware")
    elif estimate.time is None:
        notes.append(
            f"no time estimate: no {spec.training.precision} timings for {device.name}"
        )
    return [*notes, *_assumption_notes(spec, device)]


def _assumption_notes(spec: JobSpec, device: Hardware | None) -> list[str]:
    """Returns what the memory estimate assumes of a device that its name leaves open."""
    if device is None or device.device.type != "cpu" or spec.training.precision != "bf16":
        return []
    # Which kernel attends in bf16 depends on the processor's instructions.
    if device.device.bf16_products:
        return ["memory is estimated for CPUs with bf16 products; others keep other bytes"]
    return ["memory is estimated for CPUs without bf16 products; others keep other bytes"]
