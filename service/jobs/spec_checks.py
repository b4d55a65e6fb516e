"""Checks what can be wrong with a job spec whatever the cluster looks like.

Owns: names, texts and paths of a spec, and folders that other jobs write to. Must not
know: HTTP, the cluster's size (`service.jobs.cluster_fit`).
"""

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from megatron_ray.config.errors.messages import suggestion
from megatron_ray.config.errors.spec_problems import pointer_to
from megatron_ray.config.problem import Problem
from megatron_ray.validation import check
from megatron_ray.validation.storage.path_rules import PathRules, is_below, place_of
from service.jobs import lifecycle
from service.settings import Settings
from service.store.schema import JobRow
from workers.decisions.elasticity import elastic_problems
from workers.protocol.job import JobSpec

MAX_NAME_CHARS = 80
"""Characters of a wrong name or path that a message repeats."""


def check_rules(spec: JobSpec, settings: Settings) -> list[Problem]:
    """Returns everything that is wrong with a spec wherever it runs."""
    # All of them, so that the user can mend everything at once.
    return [
        *_check_names(spec, settings),
        *_check_text(spec.model_dump(mode="json"), ()),
        *check.find_problems(spec, path_rules=path_rules(settings)),
        *elastic_problems(spec),
    ]


def path_rules(settings: Settings) -> PathRules:
    """Returns the places that specs may name."""
    everywhere: tuple[str, ...] = ()
    if settings.single_user:
        everywhere = ("/", "s3://", "gs://")
    data_prefixes = settings.data_prefixes
    if data_prefixes is None:
        data_prefixes = everywhere
    storage_prefixes = settings.storage_prefixes
    if storage_prefixes is None:
        storage_prefixes = everywhere
    return PathRules(
        data_prefixes,
        storage_prefixes,
        data_dir=str(settings.data_dir),
        jobs_dir=str(settings.jobs_dir),
    )


def check_storage(session: Session, spec: JobSpec) -> list[Problem]:
    """Returns a problem when a job that has not ended writes to the spec's folder.

    Two jobs in one folder would destroy each other's checkpoints and reports.
    """
    if spec.storage is None:
        return []
    # Compared in Python: the same folder may be spelt in many ways.
    folder = place_of(spec.storage.path)
    statement = sa.select(JobRow.id, JobRow.job_dir).where(
        JobRow.status.not_in(lifecycle.TERMINAL)
    )
    for job_id, job_dir in session.execute(statement):
        # Inside it is no better: it may be the folder of its checkpoints.
        if is_below(folder, place_of(job_dir)):
            detail = (
                f"{job_id} is writing to {job_dir}; choose another folder, leave storage out, "
                f"or wait until {job_id} has ended"
            )
            return [Problem("/storage/path", "in_use", detail)]
    return []


def _check_names(spec: JobSpec, settings: Settings) -> list[Problem]:
    # Operators name what specs may use, so that no spec brings images or secrets along.
    problems = _check_name("image", "/image", spec.image, settings.images)
    if not settings.has_cluster(spec.cluster):
        unknown = _check_name("cluster", "/cluster", spec.cluster, settings.clusters)
        problems = [*unknown, *problems]
    for index, name in enumerate(spec.credentials):
        pointer = f"/credentials/{index}"
        problems += _check_name("credentials", pointer, name, settings.credentials)
    return problems or _check_credentials_use(spec)


def _check_credentials_use(spec: JobSpec) -> list[Problem]:
    """Returns why credentials would break the job's own storage.

    The driver and the service open it with the cluster's variables, which a spec's
    credentials replace in the ranks.
    """
    if not spec.credentials or spec.storage is None:
        return []
    # Local folders have no scheme.
    if "://" not in place_of(spec.storage.path):
        return []
    detail = (
        "credentials are for data and weights that the job reads, and storage.path is an object "
        "store, which is opened with those of the cluster; write to a folder, or leave "
        "credentials out"
    )
    return [Problem("/credentials", "storage_is_a_store", detail)]


def _check_name(
    field: str, pointer: str, name: str, allowed: Sequence[str]
) -> list[Problem]:
    if name in allowed:
        return []
    if allowed:
        hint = suggestion(name, allowed) or f"known: {', '.join(allowed)}"
    else:
        hint = "none is configured; leave it out"
    detail = f"{field} {name[:MAX_NAME_CHARS]!r} is not configured here; {hint}"
    return [Problem(pointer, "unknown_name", detail)]


def _check_text(node: Any, parts: tuple[str | int, ...]) -> list[Problem]:
    """Finds NUL characters below a node: Postgres stores none, and paths end at them."""
    if isinstance(node, str) and "\0" in node:
        return [_nul_problem(parts, "text")]
    problems: list[Problem] = []
    if isinstance(node, dict):
        if "\0" in "".join(node):
            problems.append(_nul_problem(parts, "keys"))
        for key, value in node.items():
            problems += _check_text(value, (*parts, key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            problems += _check_text(value, (*parts, index))
    return problems


def _nul_problem(parts: tuple[str | int, ...], subject: str) -> Problem:
    detail = f"{subject} may not contain NUL characters; remove them"
    return Problem(pointer_to(parts), "nul_character", detail)
