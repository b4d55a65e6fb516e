"""Checks query parameters against those that a route declares.

Must not know: routes.

Frameworks ignore parameters that they do not know, so a misspelt filter would list
everything.
"""

import difflib
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import Request
from fastapi.dependencies.models import Dependant
from pydantic import BeforeValidator

from megatron_ray.config.errors.messages import short_value
from megatron_ray.config.errors.spec_problems import pointer_to
from megatron_ray.config.parsing.numbers import whole_number
from megatron_ray.config.problem import Problem
from service.exceptions import RequestInvalidError

_MAX_REPORTED = 20


async def check_query(request: Request) -> None:
    """Refuses query parameters that the route does not declare, or takes only once.

    A dependency of routers; async, so that it needs no thread. Raises RequestInvalidError.
    """
    # Most requests have no query.
    if not request.url.query:
        return
    route = request.scope["route"]
    declared = {name: _is_list(kind) for name, kind in _declared(route.dependant)}
    mappings = deep_objects(route.openapi_extra)
    problems = []
    for name in dict.fromkeys(request.query_params):
        count = len(request.query_params.getlist(name))
        detail = ""
        if _label(name, mappings) is None and name not in declared:
            detail = _unknown(name, [*declared, *mappings], mappings)
        elif count > 1 and not declared.get(name):
            detail = f"{name} was sent {count} times; send it once"
        if detail:
            problems.append(Problem(pointer_to(["query", name[:80]]), "extra", detail))
    if problems:
        sentences = [problem.detail for problem in problems[:_MAX_REPORTED]]
        raise RequestInvalidError("; ".join(sentences), problems[:_MAX_REPORTED])


def labels_of(request: Request, parameter: str) -> list[tuple[str, str]]:
    """Returns (label, value) of all query parameters of the form `parameter[label]`."""
    labels = []
    for name, value in request.query_params.multi_items():
        label = _label(name, [parameter])
        if label is not None:
            labels.append((label, value))
    return labels


def split_commas(values: Any) -> Any:
    """Returns the values of a repeated parameter, each of which may be a list itself.

    `?status=queued,running` and `?status=queued&status=running` are the same.
    """
    if not isinstance(values, list):
        return values
    parts = []
    for value in values:
        parts += [part.strip() for part in str(value).split(",")]
    return parts


def _read_number(value: Any) -> Any:
    if isinstance(value, str):
        number = whole_number(value)
        if number is not None:
            return number
    return value


WRITTEN_NUMBER = BeforeValidator(_read_number)
"""For parameters that are whole numbers, which are written as in a spec: 1000 or 1e3."""


def deep_object(name: str, description: str) -> dict[str, Any]:
    """Returns the declaration of a parameter that is sent as `name[label]=value`.

    FastAPI has none for parameters whose names are up to the client.
    """
    return {
        "name": name,
        "in": "query",
        "required": False,
        "description": description,
        "style": "deepObject",
        "explode": True,
        "schema": {"type": "object", "additionalProperties": {"type": "string"}},
    }


def deep_objects(openapi_extra: Mapping[str, Any] | None) -> list[str]:
    """Returns the names of a route's parameters that `deep_object` declares."""
    names = []
    for parameter in (openapi_extra or {}).get("parameters", ()):
        names.append(parameter["name"])
    return names


def _declared(dependant: Dependant) -> Iterator[tuple[str, Any]]:
    """Yields name and type of the query parameters of a route and its dependencies."""
    for field in dependant.query_params:
        yield field.alias, field.field_info.annotation
    for child in dependant.dependencies:
        yield from _declared(child)


def _is_list(annotation: Any) -> bool:
    if typing.get_origin(annotation) is list:
        return True
    # As in `list[str] | None`.
    return any(_is_list(argument) for argument in typing.get_args(annotation))


def _label(name: str, mappings: list[str]) -> str | None:
    for mapping in mappings:
        if name.startswith(f"{mapping}[") and name.endswith("]"):
            return name[len(mapping) + 1 : -1]
    return None


def _unknown(name: str, known: list[str], mappings: list[str]) -> str:
    if name in mappings:
        return f"{name} needs a label; send {name}[<label>]=<value>"
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        hint = f"did you mean {close[0]!r}?"
    elif known:
        hint = f"known here: {', '.join(sorted(known))}"
    else:
        hint = "none is known here"
    return f"unknown query parameter {short_value(name)}; {hint}"
