"""Pauses jobs, and resumes paused and ended ones.

Owns: the requests, and how the spec of an ended job is changed. Works inside the caller's
transaction. Must not know: HTTP, the rules on specs (`service.jobs.submit`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError
from sqlalchemy.orm import Session

from megatron_ray.config.errors.spec_problems import problems_from_pydantic
from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import without_lengths
from megatron_ray.config.training import LENGTHS
from megatron_ray.validation import resolution
from megatron_ray.validation.resume.comparison import compare
from service.exceptions import (
    JobActiveError,
    JobEndedError,
    JobNotRunningError,
    SpecInvalidError,
)
from service.jobs import lifecycle
from service.store.schema import JobRow
from workers.protocol.job import JobSpec
from workers.protocol.states import DesiredState, JobState, StatusReason

_END_WORDS = {
    JobState.SUCCEEDED: "succeeded",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "been cancelled",
}


@dataclass(frozen=True)
class ChangedSpec:
    """The spec of a job that is resumed, with the user's changes."""

    submitted: dict[str, Any]
    """Without defaults, as the user would have submitted it."""
    resolved: JobSpec
    changes: dict[str, Any]
    """The changed fields only, nested as in the spec."""
    resumes: int
    """The job's resumes when the spec was changed."""
    has_other_data: bool
    """Whether the data that are prepared are not those of the spec any more."""


def pause(session: Session, job: JobRow, reason: StatusReason) -> None:
    """Requests a pause: a final checkpoint, and no resources until the job is resumed.

    Does nothing for a job that is paused or being paused. Raises JobEndedError, and
    JobNotRunningError for a job that is being cancelled.
    """
    state = JobState(job.status)
    if state.is_terminal:
        raise JobEndedError(f"the job has ended ({state.value}); nothing is left to pause")
    if state is JobState.CANCELLING:
        raise JobNotRunningError("the job is being cancelled; it cannot be paused any more")
    if job.pause_reason is not None:
        return
    job.desired = DesiredState.PAUSE
    job.pause_reason = reason
    job.final_checkpoint = True
    event = lifecycle.NewEvent("job.pausing", "pause requested", data={"reason": reason})
    if reason is StatusReason.USER_PAUSED:
        event = replace(event, actor="user")
    lifecycle.add_event(session, job, event)
    lifecycle.desired_changed(session, job)


def resume(session: Session, job: JobRow) -> None:
    """Takes back a pause: a paused job returns to its place in the queue.

    Raises JobActiveError for a job that is neither paused nor being paused.
    """
    state = JobState(job.status)
    if job.pause_reason is None:
        raise JobActiveError(
            f"the job is {state.value}; only a paused or ended job can be resumed"
        )
    job.pause_reason = None
    job.desired = DesiredState.PREPARE
    if state.holds_resources:
        # Its driver has not released them yet, and continues where the ranks stopped.
        job.desired = DesiredState.RUN
    event = lifecycle.NewEvent("job.resumed", "resumed", actor="user")
    if state is JobState.PAUSED:
        lifecycle.transition(session, job, JobState.QUEUED, None, event)
    else:
        lifecycle.add_event(session, job, event)
        lifecycle.desired_changed(session, job)


def resume_ended(
    session: Session, job: JobRow, spec: ChangedSpec, *, is_agent_ready: bool
) -> None:
    """Resumes an ended job from its newest checkpoint, with a new restart budget.

    `is_agent_ready`: whether a live agent can start preparing it now.
    """
    previous = job.status
    job.spec = spec.submitted
    job.resolved_spec = spec.resolved.model_dump(mode="json")
    if job.world_size is not None:
        job.world_size = resolution.world_size(spec.resolved)
    job.name = spec.resolved.name
    job.priority = spec.resolved.priority
    lifecycle.set_labels(session, job, spec.resolved.metadata)
    job.resumes += 1
    job.failures = 0
    job.preemptions = 0
    job.problem = None
    job.ended_at = None
    job.final_checkpoint = True
    # Not by `transition`: no driver may leave a final state, only the user.
    lifecycle.enter_preparing(job, is_agent_ready=is_agent_ready)
    data = {"previous": previous, "changes": spec.changes}
    message = f"resumed after it had {_END_WORDS[JobState(previous)]}"
    event = lifecycle.NewEvent("job.resumed", message, data=data, actor="user")
    lifecycle.add_event(session, job, event)
    lifecycle.desired_changed(session, job)


def changed_spec(job: JobRow, changes: Mapping[str, Any]) -> ChangedSpec:
    """Returns the spec of an ended job with changes, which are nested as in the spec.

    Raises SpecInvalidError when it is not valid, changes what a resume may not, or leaves
    the job nothing to do.
    """
    previous = JobSpec.from_mapping(job.resolved_spec)
    # The resolved spec is changed too and not resolved again: the cluster may have
    # another size by now, and the job is to continue with the layout that it had.
    resolved = merged(_changeable(job.resolved_spec, changes), changes)
    try:
        spec = JobSpec.from_mapping(resolved)
    except ValidationError as error:
        problems = problems_from_pydantic(
            error.errors(include_url=False), resolved, model=JobSpec
        )
        raise SpecInvalidError(problems) from error
    has_other_data = spec.data != previous.data
    # The number of tokens of other data is not known before they are prepared.
    if not has_other_data:
        spec = _with_length(spec, job.prepared)
    _check_steps(job, spec)
    problems = _fixed_problems(job, spec, previous)
    problems += compare(spec, previous, "the job was trained with").problems
    if problems:
        raise SpecInvalidError(problems)
    return ChangedSpec(
        submitted=merged(_changeable(job.spec, changes), changes),
        resolved=spec,
        changes=dict(changes),
        resumes=job.resumes,
        has_other_data=has_other_data,
    )


def _changeable(spec: Mapping[str, Any], changes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a spec without its length, if the changes have another one."""
    training = changes.get("training")
    if isinstance(training, Mapping) and training.keys() & set(LENGTHS):
        return without_lengths(spec)
    return spec


def _with_length(spec: JobSpec, prepared: Mapping[str, Any] | None) -> JobSpec:
    """Fills in the steps, which may depend on the prepared data."""
    corpora = ((prepared or {}).get("manifest") or {}).get("train", ())
    if spec.training.known_steps is None and not corpora:
        return spec
    num_tokens = sum(corpus["num_tokens"] for corpus in corpora)
    resolved = resolution.with_length(spec, num_tokens)
    assert isinstance(resolved, JobSpec)
    return resolved


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested values in which the changed ones are replaced (RFC 7396).

    Unlike there, null is a value: it sets a field to null.
    """
    result = dict(values)
    for name, change in changes.items():
        current = result.get(name)
        if isinstance(change, Mapping) and isinstance(current, Mapping):
            result[name] = merged(current, change)
        else:
            result[name] = change
    return result


def _fixed_problems(job: JobRow, spec: JobSpec, previous: JobSpec) -> list[Problem]:
    """Returns a problem for each place that a job cannot leave."""
    problems = []
    if spec.storage != previous.storage:
        detail = (
            f"the job's checkpoints are in {job.job_dir}, and it continues there; leave "
            "storage out, or submit a new job with checkpoint.start_from"
        )
        problems.append(Problem("/storage/path", "fixed_field", detail))
    if spec.cluster != previous.cluster:
        detail = f"the job stays on cluster {job.cluster!r}; leave cluster out"
        problems.append(Problem("/cluster", "fixed_field", detail))
    return problems


def _check_steps(job: JobRow, spec: JobSpec) -> None:
    """Refuses to resume a job that has completed all of its steps."""
    if job.status != JobState.SUCCEEDED:
        return
    # Not from the spec, where the steps of a number of epochs are not known.
    trained = int(job.progress.get("step") or 0)
    steps = spec.training.known_steps
    if steps is None or steps > trained:
        return
    detail = (
        f"{steps}, but the job has already completed {trained} steps; set a "
        "larger number to train on"
    )
    raise SpecInvalidError([Problem("/training/steps", "nothing_to_do", detail)])
