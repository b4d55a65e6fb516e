"""Reads a job spec as the library does, where no service takes part.

Owns: the message for a spec that is wrong. Must not know: commands.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pydantic import ValidationError

from megatron_ray.config.errors.spec_problems import problems_from_pydantic
from megatron_ray.config.problem import Problem
from service.cli.failure import CommandError, with_field_lines
from workers.protocol.job import JobSpec


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
