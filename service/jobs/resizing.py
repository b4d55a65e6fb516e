"""Changes the data-parallel size of jobs.

Owns: the request. Works inside the caller's transaction. Must not know: HTTP, how the ranks
go on at another size.
"""

from sqlalchemy.orm import Session

from megatron_ray.validation import resolution
from service.exceptions import (
    JobEndedError,
    JobNotRunningError,
    NoRoomError,
    RequestInvalidError,
)
from service.jobs import lifecycle, queue
from service.jobs.capacity import resource_request
from service.store.schema import JobRow
from workers.decisions import elasticity
from workers.protocol.job import JobSpec
from workers.protocol.states import JobState


def resize(session: Session, job: JobRow, *, dp: int) -> None:
    """Requests another data-parallel size; tp, pp, cp and ep stay.

    A running job writes a checkpoint and goes on from it. Does nothing for a job of that
    size. Raises JobEndedError, JobNotRunningError for a job whose cluster is not known yet
    or that is being cancelled, RequestInvalidError for an impossible size, and NoRoomError
    when the cluster has no room for a larger one.
    """
    spec = JobSpec.from_mapping(job.resolved_spec)
    _check_state(job)
    if dp == spec.parallel.dp:
        return
    problems = elasticity.dp_problems(spec, dp)
    if problems:
        detail = _describe(spec, dp, problems[0].detail)
        raise RequestInvalidError.of_field("/dp", problems[0].code, detail)
    resized = elasticity.with_dp(spec, dp)
    world_size = resolution.world_size(resized)
    if JobState(job.status).holds_resources:
        _check_room(session, job, resized, world_size)
    job.resolved_spec = resized.model_dump(mode="json")
    job.world_size = world_size
    event = lifecycle.NewEvent(
        "job.resizing",
        f"resize requested: from dp={spec.parallel.dp} to dp={dp}, {world_size} ranks",
        data={"dp": dp, "world_size": world_size},
        actor="user",
    )
    lifecycle.add_event(session, job, event)
    lifecycle.desired_changed(session, job)


def _check_state(job: JobRow) -> None:
    state = JobState(job.status)
    if state.is_terminal:
        raise JobEndedError(
            f"the job has ended ({state.value}); only a job that has not ended can be resized"
        )
    if state is JobState.CANCELLING:
        raise JobNotRunningError(
            "the job is being cancelled; it cannot be resized any more"
        )
    if job.world_size is None:
        raise JobNotRunningError(
            f"the job waits for the first report of cluster {job.cluster!r}; resize it then"
        )


def _check_room(session: Session, job: JobRow, resized: JobSpec, world_size: int) -> None:
    """Raises NoRoomError unless the cluster can hold the new size now."""
    assert job.world_size is not None
    if world_size <= job.world_size:
        return
    # `auto` was resolved with the spec, so whether there are GPUs plays no part.
    request = resource_request(resized, world_size, has_gpus=False)
    room = queue.room_beside_others(session, job).max_ranks(request)
    if room < world_size:
        raise NoRoomError(
            f"dp={resized.parallel.dp} needs {world_size} ranks, and the cluster has room for "
            f"{room} beside its other jobs; choose a smaller dp, or wait"
        )


def _describe(spec: JobSpec, dp: int, detail: str) -> str:
    sizes = elasticity.legal_dps(spec)
    if not sizes:
        return f"the job cannot run at dp={dp}: {detail}"
    listed = ", ".join(str(size) for size in sizes)
    return f"the job cannot run at dp={dp}: {detail}; possible: {listed}"
