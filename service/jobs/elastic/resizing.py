"""Changes the data-parallel size of jobs.

Owns: the request. Works inside the caller's transaction. Must not know: HTTP, how the ranks
go on at another size.
"""

from collections.abc import Mapping
from typing import Any

from sqlalchemy.orm import Session

from megatron_ray.validation import resolution
from service.exceptions import (
    JobEndedError,
    JobNotRunningError,
    NoRoomError,
    RequestInvalidError,
)
from service.jobs import lifecycle, queue
from service.jobs.capacity import resolved_request
from service.store.schema import JobRow
from workers.decisions import elasticity
from workers.protocol.events import EventType
from workers.protocol.job import JobSpec
from workers.protocol.states import JobState
from workers.protocol.wording import counted


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
    if JobState(job.status).holds_resources:
        _check_room(session, job, elasticity.with_dp(spec, dp))
    set_dp(session, job, dp, "resize requested", actor="user")


def set_dp(
    session: Session,
    job: JobRow,
    dp: int,
    reason: str,
    *,
    actor: str = "system",
    data: Mapping[str, Any] | None = None,
) -> None:
    """Gives a job a size that is possible and for which there is room.

    `actor` is who asked for it, user or system, and `data` more fields of the event.
    """
    spec = JobSpec.from_mapping(job.resolved_spec)
    resized = elasticity.with_dp(spec, dp)
    job.resolved_spec = resized.model_dump(mode="json")
    job.world_size = resolution.world_size(resized)
    event = lifecycle.NewEvent(
        EventType.JOB_RESIZING,
        f"{reason}: from dp={spec.parallel.dp} to dp={dp}, {counted(job.world_size, 'rank')}",
        data={"dp": dp, "world_size": job.world_size, **(data or {})},
        actor=actor,
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


def _check_room(session: Session, job: JobRow, resized: JobSpec) -> None:
    """Raises NoRoomError unless the cluster can hold the new size now."""
    request = resolved_request(resized)
    assert job.world_size is not None
    if request.ranks <= job.world_size:
        return
    room = queue.room_beside_others(session, job).max_ranks(request)
    if room < request.ranks:
        raise NoRoomError(
            f"dp={resized.parallel.dp} needs {request.ranks} ranks, and the cluster has room for "
            f"{room} beside its other jobs; choose a smaller dp, or wait"
        )


def _describe(spec: JobSpec, dp: int, detail: str) -> str:
    sizes = elasticity.legal_dps(spec)
    if not sizes:
        return f"the job cannot run at dp={dp}: {detail}"
    listed = ", ".join(str(size) for size in sizes)
    return f"the job cannot run at dp={dp}: {detail}; possible: {listed}"
