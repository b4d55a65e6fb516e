"""Changes the spec of an ended job that is resumed.

Owns: how changes are merged and checked. Pure. Must not know: HTTP, the database.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from megatron_ray.config.problem import Problem
from megatron_ray.validation import resolution
from service.exceptions import SpecInvalidError
from service.jobs.lifecycle import ChangedSpec
from service.jobs.spec_errors import problems_from_pydantic
from service.store.schema import JobRow
from workers.protocol.job import JobSpec
from workers.protocol.states import JobState


def changed_spec(job: JobRow, changes: Mapping[str, Any]) -> ChangedSpec:
    """Returns the spec of an ended job with changes, which are nested as in the spec.

    Raises SpecInvalidError when it is not valid, or leaves the job nothing to do.
    """
    # The resolved spec is changed too and not resolved again: the cluster may have
    # another size by now, and the job is to continue with the layout that it had.
    resolved = merged(job.resolved_spec, changes)
    try:
        spec = JobSpec.from_mapping(resolved)
    except ValidationError as error:
        problems = problems_from_pydantic(error.errors(include_url=False), resolved)
        raise SpecInvalidError(problems) from error
    _check_steps(job, spec)
    world_size = None
    if job.world_size is not None:
        world_size = resolution.world_size(spec)
    return ChangedSpec(
        submitted=merged(job.spec, changes),
        resolved=spec.model_dump(mode="json"),
        world_size=world_size,
        changes=dict(changes),
    )


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


def _check_steps(job: JobRow, spec: JobSpec) -> None:
    """Refuses to resume a job that has completed all of its steps."""
    if job.status != JobState.SUCCEEDED:
        return
    trained = int(job.resolved_spec["training"]["steps"])
    if spec.training.steps > trained:
        return
    detail = (
        f"{spec.training.steps}, but the job has already completed {trained} steps; set a "
        "larger number to train on"
    )
    raise SpecInvalidError([Problem("/training/steps", "nothing_to_do", detail)])
