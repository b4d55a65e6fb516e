"""Pauses or cancels the jobs of a stack that is about to stop, and resumes them later.

Must not know: processes.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from service.client import Client, ServiceError
from service.local_stack.record import StackRecord
from workers.protocol.states import ACTIVE_STATES, JobState, StatusReason

_POLL_S = 0.2
_PAGE = 100
_CONFLICT = 409
_NEEDS_NO_PAUSE = (JobState.PAUSED, JobState.PREPARING)
_UNFINISHED = ",".join(ACTIVE_STATES)

Report = Callable[[str], None]
"""Receives one message for the user."""


class StopJobs(StrEnum):
    """What happens to the jobs that have not ended."""

    PAUSE = "pause"
    """They write a checkpoint, and the next `up` resumes them."""
    CANCEL = "cancel"
    """They write a checkpoint and end."""


_VERBS = {StopJobs.PAUSE: "pausing", StopJobs.CANCEL: "cancelling"}


@dataclass(frozen=True)
class StoppedJobs:
    """Ids of the jobs that had not ended when the stack was to stop."""

    paused: tuple[str, ...] = ()
    ended: tuple[str, ...] = ()
    """Jobs that were cancelled, or ended meanwhile."""
    interrupted: tuple[str, ...] = ()
    """Jobs that did not stop in time; they continue from their last checkpoint."""
    waiting: tuple[str, ...] = ()
    """Jobs that needed no stop: they were paused before, or prepare their data."""


def stop_jobs(
    record: StackRecord,
    report: Report,
    grace_s: float,
    stop: StopJobs = StopJobs.PAUSE,
    is_urgent: Callable[[], bool] = lambda: False,
) -> StoppedJobs:
    """Pauses or cancels all jobs and waits up to `grace_s` until they have stopped.

    `is_urgent` is polled; True stops waiting.
    """
    if grace_s <= 0:
        return StoppedJobs()
    try:
        with Client(record.url, record.token, timeout_s=5.0) as client:
            return _stop(client, report, grace_s, stop, is_urgent)
    except ServiceError as error:
        # A service that does not answer must not keep its stack alive.
        report(f"could not {stop.value} jobs: {error}")
        return StoppedJobs()


def _stop(
    client: Client,
    report: Report,
    grace_s: float,
    stop: StopJobs,
    is_urgent: Callable[[], bool],
) -> StoppedJobs:
    deadline = time.monotonic() + grace_s
    stopping: list[str] = []
    waiting: list[str] = []
    # Jobs without resources first: one that is queued must not be admitted when a running
    # one releases its resources.
    for job in sorted(_unfinished_jobs(client), key=_holds_resources):
        job_id = str(job["id"])
        if stop is StopJobs.PAUSE and job["status"] in _NEEDS_NO_PAUSE:
            waiting.append(job_id)
            continue
        report(f"{_VERBS[stop]} {job_id} ({job['name']})")
        _request(client, job_id, stop)
        stopping.append(job_id)
    paused: list[str] = []
    ended: list[str] = []
    while stopping and time.monotonic() < deadline and not is_urgent():
        for job_id in list(stopping):
            status = JobState(client.show(job_id)["status"])
            if status.is_terminal:
                ended.append(job_id)
                stopping.remove(job_id)
            elif status is JobState.PAUSED:
                paused.append(job_id)
                stopping.remove(job_id)
        if stopping:
            time.sleep(_POLL_S)
    return StoppedJobs(tuple(paused), tuple(ended), tuple(stopping), tuple(waiting))


def _request(client: Client, job_id: str, stop: StopJobs) -> None:
    try:
        if stop is StopJobs.CANCEL:
            client.cancel(job_id)
        else:
            client.pause(job_id, StatusReason.STACK_STOPPED)
    except ServiceError as error:
        # The job has ended meanwhile, or is being cancelled.
        if error.status != _CONFLICT:
            raise


def resume_jobs(record: StackRecord, report: Report) -> None:
    """Resumes the jobs that were paused, or being paused, when the stack was stopped."""
    try:
        with Client(record.url, record.token) as client:
            for job in _unfinished_jobs(client):
                if job["pause_reason"] == StatusReason.STACK_STOPPED:
                    report(f"resuming {job['id']} ({job['name']})")
                    _resume(client, str(job["id"]), report)
    except ServiceError as error:
        # The stack is up all the same, and the jobs stay paused.
        report(f"could not resume jobs: {error}")


def _resume(client: Client, job_id: str, report: Report) -> None:
    try:
        client.resume(job_id)
    except ServiceError as error:
        # The user has resumed or cancelled it meanwhile; the others are resumed all the same.
        if error.status != _CONFLICT:
            raise
        report(f"{job_id} is not resumed: {error.detail}")


def _holds_resources(job: dict[str, Any]) -> bool:
    return JobState(job["status"]).holds_resources


def _unfinished_jobs(client: Client) -> list[dict[str, Any]]:
    jobs: list[dict[str, Any]] = []
    after: str | None = None
    while True:
        page = client.jobs(limit=_PAGE, status=_UNFINISHED, after=after)
        jobs += page["data"]
        if not page.get("has_more"):
            return jobs
        after = page["last_id"]
