"""Reads the job spec of a run that is started without a service.

Owns: the rules on it before anything starts, and the folder of a run that names none.
Must not know: Ray, HTTP, torch.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_ray.config.checkpoint import StorageConfig
from megatron_ray.config.errors.spec_problems import problems_from_pydantic
from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import apply_overrides, read_mapping
from megatron_ray.validation import check, resolution
from workers.protocol.job import JobSpec
from workers.rank.messages import UserError


def read_spec(job: Path, overrides: Sequence[str], world_size: int) -> JobSpec:
    """Returns a job spec with the overrides, resolved for a world of that size.

    Without a storage path the job writes to runs/<name>. Raises UserError with every
    problem, one per line.
    """
    resolved = resolve_spec(parse_spec(job, overrides), world_size, str(job))
    needed = resolution.world_size(resolved)
    if needed != world_size:
        raise UserError(
            f"the layout needs a world size of {needed}, but torchrun started {world_size}; "
            f"use --nproc-per-node {needed}, or change parallel"
        )
    return resolved


def resolve_spec(spec: JobSpec, max_world: int, source: str) -> JobSpec:
    """Returns a spec with the layout and the storage path that it leaves open.

    `source` names it in the message. Raises UserError with every problem.
    """
    if spec.preflight.mode == "only":
        raise UserError(
            f"{source} cannot run: /preflight/mode: only the service measures nodes without "
            "training; leave it out, or use `megatron-ray cluster check`"
        )
    # The same rules as in the service, before anything is started.
    problems = check.find_problems(spec, max_world)
    if problems:
        raise UserError(f"{source} cannot run:{_listed(problems)}")
    resolved = resolution.resolve(spec, max_world)
    storage = resolved.storage
    if storage is None:
        storage = StorageConfig(path=str(Path("runs", spec.name).absolute()))
    # Through JSON, so that the storage path is validated with all other fields.
    values = resolved.model_dump(mode="json")
    values["storage"] = storage.model_dump()
    return JobSpec.from_mapping(values)


def parse_spec(job: Path, overrides: Sequence[str]) -> JobSpec:
    """Returns the spec in a file, with the overrides. Raises UserError."""
    values: dict[str, Any] = {}
    try:
        values = apply_overrides(read_mapping(job), overrides)
        return JobSpec.from_mapping(values)
    except OSError as error:
        raise UserError(f"cannot read {job}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {job}: it is not text in UTF-8") from error
    except ValidationError as error:
        problems = problems_from_pydantic(error.errors(), values, model=JobSpec)
        raise UserError(f"{job} is not a valid job spec:{_listed(problems)}") from error
    except ValueError as error:
        raise UserError(str(error)) from error


def _listed(problems: Iterable[Problem]) -> str:
    lines = ""
    for problem in problems:
        lines += f"\n  {problem.pointer}: {problem.detail}"
    return lines
