"""Plans a job in this process, from its spec alone.

Owns: the checks and estimates that need neither a service nor a cluster. Must not know:
how a plan is printed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pydantic import ValidationError

from megatron_ray.config.errors.spec_problems import problems_from_pydantic
from megatron_ray.config.problem import Problem
from megatron_ray.planning.answers import estimates, without_cluster
from megatron_ray.planning.hardware import Hardware, hardware_named
from megatron_ray.validation import check
from service.cli.failure import CommandError, with_field_lines
from workers.protocol.job import JobSpec
from workers.protocol.spec_warnings import export_notes


def parse_spec(values: Mapping[str, Any]) -> JobSpec:
    """Returns the spec as the library reads it.

    Raises CommandError with one line per invalid field.
    """
    try:
        return JobSpec.from_mapping(values)
    except ValidationError as error:
        problems = problems_from_pydantic(error.errors(), dict(values), model=JobSpec)
        raise problems_failure("the job spec is invalid", problems) from error


def problems_failure(title: str, problems: Sequence[Problem]) -> CommandError:
    """Returns an error with one line per problem."""
    # The shape of the service's problem documents.
    body = {"title": title, "detail": title, "errors": [asdict(item) for item in problems]}
    lines = [(problem.pointer, problem.detail) for problem in problems]
    return CommandError(with_field_lines(title, lines), exit_code=2, body=body)


def make_plan(
    values: Mapping[str, Any], hardware: str | None, ranks: int | None
) -> dict[str, Any]:
    """Returns the plan of a spec, with the fields of the service's plans.

    Raises CommandError when the spec cannot run anywhere.
    """
    device = _device(hardware)
    spec = _checked(values, device, ranks)
    return without_cluster.make_plan(spec, device, ranks, export_notes(spec))


def make_suggestions(
    values: Mapping[str, Any], hardware: str | None, ranks: int | None
) -> dict[str, Any]:
    """Returns the fastest layouts of a spec, with the fields of the service's answer.

    Raises CommandError when the spec cannot run anywhere, or no device is named.
    """
    device = _device(hardware)
    if device is None:
        raise CommandError(
            "no device to suggest layouts for", remedy="set --hardware, such as H100"
        )
    # The number of ranks is that of the layouts, not that of the spec's own degrees.
    spec = _checked(values, device, None)
    return without_cluster.make_suggestions(spec, device, ranks)


def _device(name: str | None) -> Hardware | None:
    if name is None:
        return None
    device = hardware_named(name)
    if device is None:
        raise CommandError(without_cluster.unknown_hardware(name), exit_code=2)
    return device


def _checked(
    values: Mapping[str, Any], device: Hardware | None, ranks: int | None
) -> JobSpec:
    spec = parse_spec(values)
    problems = check.find_problems(spec, ranks) or estimates.size_problems(
        without_cluster.fewest_ranks(spec)
    )
    if problems:
        raise problems_failure("the job spec is invalid", problems)
    resources = spec.resources
    if device is not None and resources.accelerator == "auto":
        accelerator = "cpu"
        if device.device.type == "cuda":
            accelerator = "gpu"
        resources = resources.model_copy(update={"accelerator": accelerator})
    return spec.model_copy(update={"resources": resources})
