"""/v1/plans: how a job would run, with nothing started."""

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Query
from starlette.concurrency import run_in_threadpool

from megatron_ray.config.problem import Problem
from megatron_ray.planning.hardware import HARDWARE, Hardware, hardware_named
from megatron_ray.planning.step_time import StepTime
from megatron_ray.planning.suggest import Suggestion, suggest
from megatron_ray.planning.tally import Tally
from service.api.models import (
    FieldError,
    Plan,
    PlanMemory,
    PlanRank,
    PlanSuggestion,
    PlanTime,
    PlanTraffic,
    Suggestions,
)
from service.http.dependencies import Service
from service.http.errors import ProblemError, spec_invalid
from service.jobs import estimates, submissions, submit
from service.jobs.capacity import ClusterCapacity, need_of
from service.jobs.estimates import Estimates
from workers.protocol.job import JobSpec

MOST_RANKS = 65536
router = APIRouter(prefix="/v1", tags=["plans"])
Device = Annotated[
    str | None,
    Query(
        description="What the time is estimated for, and whose memory counts: "
        "A100, H100, H200, B200 "
        "or CPU."
    ),
]
Ranks = Annotated[
    int | None,
    Query(
        ge=1,
        le=MOST_RANKS,
        description="How many ranks; as many as the job would get when not given.",
    ),
]


@router.post("/plans")
async def make_plan(spec: JobSpec, service: Service, hardware: Device = None) -> Plan:
    """Resolved spec, rank map, memory, communication and an estimate of the step's
    time; the body is a job spec.

    One that is wrong is refused; one that is right but does not fit says so in
    `problems`.
    """
    asked = _device(hardware)
    room = await _right(service, spec)
    job_dir = (
        spec.storage.path
        if spec.storage is not None
        else str(service.settings.data_dir / "jobs" / "job-example")
    )
    found = submissions.resolve(spec, room, job_dir)
    _refuse_too_many(found.world_size)
    device = asked or _device_of(spec, found.spec, room)
    unfit = await run_in_threadpool(_unfit, spec, found.spec, room, asked)
    wrong_paths = await submit.ask_agent(service, spec, room, job_dir)
    need = need_of(found.spec, found.world_size, has_gpus=False)
    known = await run_in_threadpool(estimates.estimates, found.spec, device)
    return Plan(
        resolved_spec=found.spec.model_dump(mode="json"),
        world_size=found.world_size,
        ranks=[PlanRank.model_construct(**rank) for rank in estimates.rank_map(found.spec)],
        memory=None if known is None else _memory(known),
        communication=None
        if known is None or known.communication is None
        else _traffic(known.communication),
        bubble_share=None if known is None else known.bubble_share,
        hardware=None if device is None else device.name,
        time=None if known is None or known.time is None else _time(known.time),
        fits=False if unfit else (True if room.known else None),
        room=room.ranks(need) if room.known else None,
        problems=[
            FieldError(**asdict(problem)) for problem in (*unfit, *(wrong_paths or ()))
        ],
        notes=_unknowns(spec, room, device, known, paths_known=wrong_paths is not None),
    )


@router.post("/plans/suggest")
async def make_suggestions(
    spec: JobSpec, service: Service, hardware: Device = None, ranks: Ranks = None
) -> Suggestions:
    """The quickest layouts that fit: tp, pp, vpp, cp, ep, dp, micro batch and
    recomputation are tried, everything else is the spec's.
    """
    asked = _device(hardware)
    room = await _right(service, spec)
    found = submissions.resolve(
        spec, room, str(service.settings.data_dir / "jobs" / "job-example")
    )
    device = asked or _device_of(spec, found.spec, room)
    world = ranks or found.world_size
    known = estimates.with_vocabulary(found.spec)
    notes = []
    if device is None:
        raise _wrong_query(
            "hardware", "which device the cluster has is not known; name one"
        )
    if known is None:
        notes.append(
            "nothing can be estimated before the tokenizer's file is read; set model.vocab_size"
        )
    elif known.training.precision not in device.efficiencies:
        notes.append(
            f"{device.name} is not known to compute in {known.training.precision}; name "
            "another device or precision"
        )
    if ranks is None and not room.known:
        notes.append(
            f"cluster {spec.cluster!r} has not been reported yet: {world} ranks are what "
            "the job needs at least; give ranks"
        )
    best = [] if known is None else await run_in_threadpool(suggest, known, world, device)
    if not best and not notes:
        notes.append(
            f"no layout of those that are tried fits on {world} ranks; give more, or use "
            "zero=3 or a smaller model"
        )
    return Suggestions(
        world_size=world,
        hardware=device.name,
        data=[_suggestion(entry) for entry in best],
        notes=notes,
    )


async def _right(service: Service, spec: JobSpec) -> ClusterCapacity:
    """The cluster as it is known.

    Raises spec_invalid for a spec that is wrong wherever it runs.
    """
    room, taken = await run_in_threadpool(_look, service, spec)
    problems = [*submissions.check_rules(spec, service.settings), *taken]
    if problems:
        raise spec_invalid(problems)
    return room


def _look(service: Service, spec: JobSpec) -> tuple[ClusterCapacity, list[Problem]]:
    with service.store.read() as session:
        return submissions.room_of(session, spec.cluster), submissions.check_storage(
            session, spec
        )


def _unfit(
    spec: JobSpec, resolved: JobSpec, room: ClusterCapacity, asked: Hardware | None
) -> list[Problem]:
    """What keeps it from running; the memory is that of the device asked for, else of
    the cluster's.
    """
    found = submissions.check_fit(spec, room)
    if asked is None:
        return found
    return [
        problem for problem in found if problem.code != "memory_fits"
    ] or estimates.check_memory(resolved, asked)


def _refuse_too_many(ranks: int) -> None:
    if ranks > MOST_RANKS:
        text = (
            f"a plan lists at most {MOST_RANKS} ranks, this one has {ranks}; lower a degree"
        )
        raise spec_invalid([Problem("/parallel", "too_many_ranks", text)])


# ---- devices


def _device(name: str | None) -> Hardware | None:
    if name is None:
        return None
    found = hardware_named(name)
    if found is None:
        raise _wrong_query(
            "hardware", f"hardware={name[:80]!r} is not known; known: {', '.join(HARDWARE)}"
        )
    return found


def _wrong_query(name: str, detail: str) -> ProblemError:
    return ProblemError(
        "request_invalid",
        detail,
        errors=[Problem(f"/query/{name}", "unknown_hardware", detail)],
    )


def _device_of(spec: JobSpec, resolved: JobSpec, room: ClusterCapacity) -> Hardware | None:
    """What a job would run on; None where that is not known."""
    if resolved.resources.accelerator == "gpu":
        return room.gpu
    return HARDWARE["CPU"] if room.known or spec.resources.accelerator == "cpu" else None


# ---- bodies


def _memory(known: Estimates) -> PlanMemory:
    memory = known.memory
    return PlanMemory(
        **asdict(memory),
        total_bytes_estimate=memory.total_bytes,
        vocab_size=known.vocab_size,
    )


def _traffic(sent: Tally) -> list[PlanTraffic]:
    return [
        PlanTraffic(
            axis=axis, kind=kind, operations=sent.operations[axis, kind], bytes=size
        )
        for (axis, kind), size in sent.bytes.items()
    ]


def _time(time: StepTime) -> PlanTime:
    return PlanTime(**asdict(time))


def _suggestion(entry: Suggestion) -> PlanSuggestion:
    return PlanSuggestion(
        changes=entry.changes,
        total_bytes_estimate=entry.memory.total_bytes,
        time=_time(entry.time),
    )


def _unknowns(
    spec: JobSpec,
    room: ClusterCapacity,
    device: Hardware | None,
    known: Estimates | None,
    *,
    paths_known: bool,
) -> list[str]:
    notes = []
    if not room.known:
        notes.append(
            f"cluster {spec.cluster!r} has not been reported yet: whether the job fits is "
            "not known, dp: auto counts as 1, no GPUs"
        )
    if not paths_known:
        notes.append("paths were not checked: no agent answered")
    if known is None:
        return [
            *notes,
            "memory is not known before the tokenizer's file is read; set model.vocab_size "
            "to see it",
        ]
    if known.communication is None:
        notes.append("communication is not counted where torch gathers weights (zero=3)")
    if device is None:
        notes.append("memory is counted for GPUs: what the job would run on is not known")
        notes.append(
            "no time is estimated: what the job would run on is not known; name a device "
            "with hardware"
        )
    elif known.time is None:
        notes.append(f"no time is estimated for {spec.training.precision} on {device.name}")
    return [*notes, *_assumed(spec, device)]


def _assumed(spec: JobSpec, device: Hardware | None) -> list[str]:
    """What of the device decides the memory, where devices of its name differ in it."""
    if device is None or device.device.type != "cpu" or spec.training.precision != "bf16":
        return []
    which = "with"
    others = "without"
    if not device.device.bf16_products:
        which, others = others, which
    return [
        f"memory is counted for CPUs {which} products of bf16; those {others} keep other "
        "bytes of attention"
    ]
