"""Turns pydantic's errors into Problems that name a field and a remedy.

Owns: JSON pointers and hints for wrong fields. Pure. Must not know: HTTP.
"""

import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from megatron_ray.config.errors.messages import (
    plain_message,
    refusal,
    short_value,
    suggestion,
)
from megatron_ray.config.problem import Problem

Location = Sequence[str | int]
NAME_RULE = "must be lower-case letters, digits and dashes, at most 63 characters"
_NOT_AN_OBJECT = ("model_type", "model_attributes_type", "dict_type")


def problems_from_pydantic(
    errors: Iterable[Mapping[str, Any]],
    body: Any,
    *,
    skip: int = 0,
    model: type[BaseModel] | None = None,
    expected: str = "a JSON object",
) -> list[Problem]:
    """Returns one Problem per wrong field of a body.

    `skip` leading parts of each location belong to the framework and not to the body.
    `model` is the body's model, whose fields are suggested for unknown ones; `expected`
    is what to send instead of nothing.
    """
    problems: dict[str, Problem] = {}
    for error in errors:
        location = tuple(error["loc"])[skip:]
        pointer, value = _locate(location, body, missing=error["type"] == "missing")
        if _is_repetition(error, value):
            continue
        if error["type"] == "missing" and not location:
            detail = f"the request body is empty; send {expected}"
        else:
            detail = _detail(error, location, value, model)
        earlier = problems.get(pointer)
        if earlier is not None:
            # Members of a union complain one by one about the same field.
            detail = f"{earlier.detail}; or {detail}"
            problems[pointer] = Problem(pointer, earlier.code, detail)
        else:
            problems[pointer] = Problem(pointer, _code(error), detail)
    return list(problems.values())


def pointer_to(parts: Iterable[str | int]) -> str:
    """Returns the JSON pointer of a location (RFC 6901)."""
    pointer = ""
    for part in parts:
        # `~` first, or the `~1` written for a slash would be escaped again.
        pointer += "/" + str(part).replace("~", "~0").replace("/", "~1")
    return pointer


def _code(error: Mapping[str, Any]) -> str:
    if error["type"] in _NOT_AN_OBJECT:
        return "model_type"
    return str(error["type"])


def _is_repetition(error: Mapping[str, Any], value: Any) -> bool:
    """Returns whether a list is called too short because its items are wrong."""
    if error["type"] != "too_short" or not isinstance(value, list | tuple):
        return False
    return len(value) >= int(error["ctx"]["min_length"])


def _locate(location: Location, body: Any, *, missing: bool) -> tuple[str, Any]:
    """Returns the pointer and the value of the field that a location leads to.

    Follows the location as far as the body goes. What pydantic adds beyond (names of
    union members, `[key]`) is no field of the body.
    """
    # Pointers must lead to something that the user has sent.
    node = body
    parts: list[str | int] = []
    for part in location:
        if _contains(node, part):
            node = node[part]
        elif isinstance(node, dict) and missing and part == location[-1]:
            # A missing field is not in the body, but its pointer is what to add.
            node = None
        else:
            break
        parts.append(part)
    return pointer_to(parts), node


def _contains(node: Any, part: str | int) -> bool:
    if isinstance(node, list):
        return isinstance(part, int) and part < len(node)
    return isinstance(node, dict) and part in node


def _detail(
    error: Mapping[str, Any], location: Location, value: Any, model: type[BaseModel] | None
) -> str:
    kind = error["type"]
    if kind == "missing":
        return f"{location[-1]} is required; add it"
    if kind == "extra_forbidden":
        return _unknown_field(str(location[-1]), _fields_at(location[:-1], model))
    message = plain_message(error)
    is_name = tuple(location) == ("name",) and model is not None
    if kind == "string_pattern_mismatch" and is_name:
        # The only pattern that users meet; a regular expression would not help them.
        message = NAME_RULE
    if kind == "unknown_preset":
        return message
    if kind == "value_error" and isinstance(value, dict | list):
        # Our own validators of whole objects name the values that matter by themselves.
        return message
    if not location:
        message = f"the request body {message}"
    return refusal(error, value, message)


def _unknown_field(name: str, known: Sequence[str]) -> str:
    hint = "leave it out"
    if known:
        # Most unknown fields are misspelt ones.
        hint = suggestion(name, known) or f"known here: {', '.join(known)}"
    return f"unknown field {short_value(name)}; {hint}"


def _fields_at(location: Location, model: type[BaseModel] | None) -> list[str]:
    """Returns the names of the fields at a location; none where there is no model."""
    for part in location:
        if model is None:
            return []
        if isinstance(part, str) and part in model.model_fields:
            model = _model_in(model.model_fields[part].annotation)
    return sorted(model.model_fields) if model else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Returns the first model in an annotation such as `tuple[Model, ...] | None`."""
    # `list[int]` is an instance of type too, but issubclass refuses it.
    if isinstance(annotation, type) and typing.get_origin(annotation) is None:
        if issubclass(annotation, BaseModel):
            return annotation
    for argument in typing.get_args(annotation):
        model = _model_in(argument)
        if model is not None:
            return model
    return None
