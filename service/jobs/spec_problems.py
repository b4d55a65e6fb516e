"""pydantic's complaints in the user's words.

Owns: JSON pointers and hints for wrong fields. Pure. Must not know: HTTP.
"""

import difflib
import typing
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from megatron_ray.config.problem import Problem
from workers.protocol.job import JobSpec

LONGEST_VALUE = 80
_NO_OBJECT = ("model_type", "model_attributes_type", "dict_type")


def from_pydantic(
    errors: Iterable[ErrorDetails | dict[str, Any]],
    given: Any,
    *,
    skip: int = 0,
    model: type[BaseModel] | None = JobSpec,
) -> list[Problem]:
    """One Problem per field; `skip` leading parts of each location are not part of what
    was given; `model` knows the fields.

    Members of a union complain one by one about the same field; they become one
    problem.
    """
    found: dict[str, Problem] = {}
    for error in errors:
        location = tuple(error["loc"])[skip:]
        pointer, value = _locate(location, given, missing=error["type"] == "missing")
        text = _detail(error, location, value, model)
        if pointer in found:
            earlier = found[pointer]
            found[pointer] = Problem(pointer, earlier.code, f"{earlier.detail}; or {text}")
        else:
            code = "model_type" if error["type"] in _NO_OBJECT else error["type"]
            found[pointer] = Problem(pointer, code, text)
    return list(found.values())


def pointer_to(parts: Iterable[str | int]) -> str:
    """RFC 6901."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)


def _locate(location: Sequence[str | int], given: Any, *, missing: bool) -> tuple[str, Any]:
    """Follows a location as far as what was given goes: what pydantic adds beyond
    (union members, `[key]`) is no field.
    """
    node = given
    parts = []
    for part in location:
        if isinstance(node, dict) and part in node:
            node = node[part]
        elif isinstance(node, list) and isinstance(part, int):
            if part >= len(node):
                break
            node = node[part]
        elif isinstance(node, dict) and missing and part == location[-1]:
            node = None
        else:
            break
        parts.append(part)
    return pointer_to(parts), node


def _detail(
    error: ErrorDetails | dict[str, Any],
    location: Sequence[str | int],
    value: Any,
    model: type[BaseModel] | None,
) -> str:
    kind = error["type"]
    name = str(location[-1]) if location else "the body"
    if kind == "extra_forbidden":
        known = _fields_at(location[:-1], model)
        close = difflib.get_close_matches(name, known, n=1)
        hint = (
            f"did you mean {close[0]!r}?"
            if close
            else f"known here: {', '.join(known)}"
            if known
            else "leave it out"
        )
        return f"unknown field {_short(name)}; {hint}"
    if kind == "missing":
        return f"{name} is required; add it"
    if kind in _NO_OBJECT:
        return f"an object of fields is expected, not {_short(value)}"
    text = str(error["msg"]).removeprefix("Value error, ")
    if kind == "value_error" and isinstance(value, dict | list):
        return text
    return f"{text[:1].lower()}{text[1:]}, not {_short(value)}"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    text = (
        {None: "null", True: "true", False: "false"}.get(value)
        if value is None or isinstance(value, bool)
        else repr(value)
    )
    assert text is not None
    return text if len(text) <= LONGEST_VALUE else text[:LONGEST_VALUE] + "..."


def _fields_at(location: Sequence[str | int], model: type[BaseModel] | None) -> list[str]:
    """Names of the fields of the model at a location; empty where there is none."""
    for part in location:
        if model is None:
            return []
        if isinstance(part, str) and part in model.model_fields:
            model = _model_in(model.model_fields[part].annotation)
    return sorted(model.model_fields) if model else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if (
        isinstance(annotation, type)
        and typing.get_origin(annotation) is None
        and issubclass(annotation, BaseModel)
    ):
        return annotation
    return next(
        (
            found
            for item in typing.get_args(annotation)
            if (found := _model_in(item)) is not None
        ),
        None,
    )
