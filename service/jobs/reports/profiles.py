"""Requests profiles of a job's steps, and stores what its ranks report of them.

Owns: which requests are possible, the rows and events of profiles, how many a job keeps.
Must not know: HTTP, how ranks are profiled.
"""

import time
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from megatron_ray.commands import ProfileRequest
from megatron_ray.config.training import STEPS_RULE, is_profilable, step_range
from service.exceptions import (
    JobEndedError,
    JobNotRunningError,
    ProfileRunningError,
    RequestInvalidError,
)
from service.jobs import lifecycle
from service.jobs.lifecycle import NewEvent
from service.store.schema import AttemptRow, JobRow, ProfileRow
from workers.protocol.events import EventType
from workers.protocol.states import JobState
from workers.protocol.wire import ProfileOrder, Record
from workers.protocol.wording import counted

MAX_PROFILES = 50
"""Newest profiles that a job keeps."""
_MAX_OPERATORS = 100


class ProfileStatus(StrEnum):
    """What has become of a profile."""

    PENDING = "pending"
    """Its steps have not been done, or its files are being written."""
    WRITTEN = "written"
    """At least one rank has written its files."""
    FAILED = "failed"
    """There are no files."""


class _Report(BaseModel):
    """The fields of a rank's report."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    rank: int = Field(ge=0)
    number: int = Field(ge=0)
    first_step: int = Field(ge=1)
    last_step: int = Field(ge=1)
    folder: str = ""
    files: tuple[str, ...] = Field(default=(), max_length=100)
    seconds: float = 0.0
    operators: tuple[dict[str, Any], ...] = Field(default=(), max_length=_MAX_OPERATORS)
    problem: str | None = None


# ---- requests


def request(session: Session, job: JobRow, steps: str, ranks: Sequence[int]) -> ProfileRow:
    """Requests that ranks of a running job profile some of its steps, such as `10-12`.

    Raises JobEndedError, JobNotRunningError, ProfileRunningError while an earlier profile
    is not written, RequestInvalidError for steps and ranks that the job does not have.
    """
    _require_running(job)
    for row in of_job(session, job):
        if status(job, row) is ProfileStatus.PENDING:
            raise ProfileRunningError(
                f"a profile of steps {_steps(row)} is not written yet; try again when it is"
            )
    first, last = step_range(steps)
    _check_steps(job, steps, first, last)
    _check_ranks(session, job, ranks)
    order = ProfileOrder(
        number=(job.profile_order or {}).get("number", 0) + 1,
        attempt=job.attempt,
        first_step=first,
        last_step=last,
        ranks=tuple(sorted(set(ranks))),
    )
    row = _new_row(session, job, order.attempt, order, order.ranks, time.time())
    job.profile_order = order.model_dump(mode="json")
    message = f"profile of steps {_steps(row)} requested of {_ranks(row.ranks)}"
    data = {"number": row.number, "folder": folder(job, row)}
    event = NewEvent(EventType.PROFILE_REQUESTED, message, data=data, actor="user")
    lifecycle.add_event(session, job, event)
    lifecycle.desired_changed(session, job)
    return row


def _require_running(job: JobRow) -> None:
    state = JobState(job.status)
    if state.is_terminal:
        raise JobEndedError(
            f"the job has ended ({state.value}); only a running job can be profiled"
        )
    if state is not JobState.RUNNING:
        raise JobNotRunningError(
            f"the job is {state.value}; wait until it is running, or name the steps in "
            "training.profile of a spec"
        )


def _check_steps(job: JobRow, steps: str, first: int, last: int) -> None:
    if not is_profilable(first, last):
        raise RequestInvalidError.of_field("/steps", "step_range", f"steps {STEPS_RULE}")
    progress = job.progress
    step = progress.get("step", 0)
    # The progress may still be that of an earlier attempt, which was further.
    if progress.get("attempt") == job.attempt and first <= step:
        detail = f"the job has done {step} steps; name later ones than {steps}"
        raise RequestInvalidError.of_field("/steps", "steps_past", detail)
    num_steps = job.resolved_spec.get("training", {}).get("steps")
    if isinstance(num_steps, int) and last > num_steps:
        detail = f"the job's last step is {num_steps}; name earlier ones than {steps}"
        raise RequestInvalidError.of_field("/steps", "beyond_the_run", detail)


def _check_ranks(session: Session, job: JobRow, ranks: Sequence[int]) -> None:
    attempt = session.get(AttemptRow, (job.number, job.attempt))
    num_ranks = job.world_size
    if attempt is not None and attempt.world_size is not None:
        num_ranks = attempt.world_size
    if num_ranks is None:
        return
    for rank in ranks:
        if rank >= num_ranks:
            have = f"the job has {num_ranks} ranks, 0 to {num_ranks - 1}"
            if num_ranks == 1:
                have = "the job has one rank, 0"
            detail = f"there is no rank {rank}: {have}"
            raise RequestInvalidError.of_field("/ranks", "no_rank", detail)


# ---- reports


def apply(session: Session, job: JobRow, source: str, record: Record) -> None:
    """Stores a record of kind `profile`; the last rank's has an event.

    Raises ValidationError.
    """
    report = _Report.model_validate(record.data)
    row = session.get(ProfileRow, (job.number, record.attempt, report.number))
    if row is None:
        # That of the spec, which was not requested, or one that was dropped since.
        ranks = _planned_ranks(session, job, record.attempt, report.rank)
        row = _new_row(session, job, record.attempt, report, ranks, record.at)
    was_complete = _is_complete(row)
    # A new mapping, because a change within one would not be stored.
    row.reports = {**row.reports, str(report.rank): report.model_dump(mode="json")}
    if was_complete or not _is_complete(row):
        return
    event = NewEvent(
        EventType.JOB_PROFILED,
        _outcome(row),
        data={"number": row.number, "folder": report.folder, "files": _files(row)},
        ranks=tuple(row.ranks),
        source=source,
        n=record.n,
        attempt=record.attempt,
        at=record.at,
    )
    if _problems(row):
        event = NewEvent(**{**vars(event), "level": "warn"})
    lifecycle.add_event(session, job, event)


def _planned_ranks(session: Session, job: JobRow, attempt: int, rank: int) -> list[int]:
    """Returns the ranks of the spec's profile that the attempt has."""
    planned = (job.resolved_spec.get("training", {}).get("profile") or {}).get("ranks", ())
    row = session.get(AttemptRow, (job.number, attempt))
    ranks = {rank}
    if row is not None and row.world_size is not None:
        ranks.update(one for one in planned if one < row.world_size)
    return sorted(ranks)


def _new_row(
    session: Session,
    job: JobRow,
    attempt: int,
    steps: ProfileOrder | _Report,
    ranks: Sequence[int],
    at: float,
) -> ProfileRow:
    row = ProfileRow(job=job.number, attempt=attempt, number=steps.number)
    row.first_step = steps.first_step
    row.last_step = steps.last_step
    row.ranks = list(ranks)
    row.created_at = at
    row.reports = {}
    session.add(row)
    session.flush()
    for old in of_job(session, job)[:-MAX_PROFILES]:
        session.delete(old)
    return row


# ---- reading


def of_job(session: Session, job: JobRow) -> list[ProfileRow]:
    """Returns a job's profiles, oldest first."""
    statement = (
        sa.select(ProfileRow)
        .where(ProfileRow.job == job.number)
        .order_by(ProfileRow.attempt, ProfileRow.number)
    )
    return list(session.scalars(statement))


def folder(job: JobRow, row: ProfileRow) -> str:
    """Returns where the ranks write their files."""
    storage = job.resolved_spec.get("storage") or {}
    steps = ProfileRequest(row.first_step, row.last_step)
    return steps.folder(storage.get("path") or job.job_dir, row.attempt)


def status(job: JobRow, row: ProfileRow) -> ProfileStatus:
    """Returns what has become of a profile."""
    if _files(row):
        if _is_complete(row) or _has_ended(job, row):
            return ProfileStatus.WRITTEN
        return ProfileStatus.PENDING
    if _is_complete(row) or _has_ended(job, row):
        return ProfileStatus.FAILED
    return ProfileStatus.PENDING


def reports(job: JobRow, row: ProfileRow) -> list[dict[str, Any]]:
    """Returns what each rank has reported, or will not report any more."""
    rows = []
    for rank in row.ranks:
        report = row.reports.get(str(rank))
        if report is None and _has_ended(job, row):
            report = {"problem": f"attempt {row.attempt} has ended before it was written"}
        if report is not None:
            rows.append({**report, "rank": rank})
    return rows


def _is_complete(row: ProfileRow) -> bool:
    return len(row.reports) >= len(row.ranks)


def _has_ended(job: JobRow, row: ProfileRow) -> bool:
    """Whether the attempt has ended, so that no report follows."""
    return row.attempt < job.attempt or not JobState(job.status).holds_resources


def _files(row: ProfileRow) -> list[str]:
    files: list[str] = []
    for report in row.reports.values():
        files += report["files"]
    return files


def _problems(row: ProfileRow) -> list[str]:
    problems = []
    for rank, report in row.reports.items():
        if report["problem"] is not None:
            problems.append(f"rank {rank}: {report['problem']}")
    return problems


def _outcome(row: ProfileRow) -> str:
    problems = _problems(row)
    if len(problems) == len(row.reports):
        return f"no profile of steps {_steps(row)}: {'; '.join(problems)}"
    text = f"profile of steps {_steps(row)}: {counted(len(_files(row)), 'file')}"
    if problems:
        text += f"; {'; '.join(problems)}"
    return text


def _steps(row: ProfileRow) -> str:
    return str(ProfileRequest(row.first_step, row.last_step))


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks))}"
