"""/v1/plans: how a job would run, with nothing started."""

from dataclasses import asdict

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool

from megatron_ray.rules.problem import Problem
from service import plan, submissions
from service.api import intake
from service.api.models import FieldError, Plan, PlanMemory, PlanRank
from service.context import Service
from service.errors import spec_invalid
from service.room import Room, need_of
from workers.job import JobSpec

MOST_RANKS = 65536
router = APIRouter(prefix="/v1", tags=["plans"])


@router.post("/plans")
async def make_plan(spec: JobSpec, service: Service) -> Plan:
    """Resolved spec, rank map and memory; the body is a job spec.

    One that is wrong is refused; one that is right but does not fit says so in `problems`.
    """
    room, taken = await run_in_threadpool(_look, service, spec)
    problems = [*submissions.check_rules(spec, service.settings), *taken]
    if problems:
        raise spec_invalid(problems)
    job_dir = spec.storage.path if spec.storage is not None else str(service.settings.data_dir / "jobs" / "job-example")
    found = submissions.resolve(spec, room, job_dir)
    if found.world_size > MOST_RANKS:
        text = f"a plan lists at most {MOST_RANKS} ranks, this one has {found.world_size}; lower a degree"
        raise spec_invalid([Problem("/parallel", "too_many_ranks", text)])
    unfit = submissions.check_fit(spec, room)
    wrong_paths = await intake.ask_agent(service, spec, room, job_dir)
    need = need_of(found.spec, found.world_size, has_gpus=False)
    memory = plan.memory(found.spec)
    return Plan(
        resolved_spec=found.spec.model_dump(mode="json"),
        world_size=found.world_size,
        ranks=[PlanRank(**rank) for rank in plan.rank_map(found.spec)],
        memory=None if memory is None else PlanMemory(**asdict(memory)),
        fits=not unfit if room.known else None,
        room=room.ranks(need) if room.known else None,
        problems=[FieldError(**asdict(problem)) for problem in (*unfit, *(wrong_paths or ()))],
        notes=_notes(spec, room, paths_known=wrong_paths is not None, memory_known=memory is not None),
    )


def _look(service: Service, spec: JobSpec) -> tuple[Room, list[Problem]]:
    with service.store.read() as session:
        return submissions.room_of(session, spec.cluster), submissions.check_storage(session, spec)


def _notes(spec: JobSpec, room: Room, *, paths_known: bool, memory_known: bool) -> list[str]:
    notes = []
    if not room.known:
        notes.append(
            f"cluster {spec.cluster!r} has not been reported yet: whether the job fits is not known, dp: auto counts as 1, no GPUs"
        )
    if not paths_known:
        notes.append("paths were not checked: no agent answered")
    if not memory_known:
        notes.append("memory is not known before the tokenizer's file is read; set model.vocab_size to see it")
    return notes
