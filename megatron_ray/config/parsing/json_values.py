"""Reads JSON that a person may have written.

Owns: what JSON or YAML allows and a spec does not: fields given twice, infinities, dates,
values that contain themselves. Pure. Must not know: any field.
"""

import json
import math
from collections.abc import Iterator
from typing import Any

from megatron_ray.config.parsing.numbers import int_or_text


class RepeatedKeyError(ValueError):
    """An object has a key twice, of which all but the last would be ignored."""


def read_json(content: str | bytes) -> Any:
    """Returns the value of a JSON document.

    Raises json.JSONDecodeError, RepeatedKeyError.
    """
    return json.loads(content, object_pairs_hook=_object, parse_int=int_or_text)


def repetition(key: object) -> str:
    """Returns the message for a key that stands twice in one object."""
    return f"the key {str(key)[:80]!r} is given twice; keep one of them"


def require_json(value: Any, source: str) -> None:
    """Raises ValueError for a value that a request could not carry as JSON.

    `source` names where it comes from.
    """
    try:
        for pointer, foreign in _foreign(value, ""):
            raise ValueError(
                f"{source} has a value that JSON does not support: {pointer} is {foreign}; use "
                "a finite number, or put it in quotes"
            )
    except RecursionError as error:
        # YAML's anchors may make a value a part of itself.
        raise ValueError(
            f"{source} has a value that JSON does not support: it is nested without end"
        ) from error


def _foreign(value: Any, pointer: str) -> Iterator[tuple[str, Any]]:
    """Yields the pointer of each value that is none of JSON, and the value."""
    if isinstance(value, dict):
        for key, member in value.items():
            yield from _foreign(member, f"{pointer}/{key}")
    elif isinstance(value, list):
        for index, member in enumerate(value):
            yield from _foreign(member, f"{pointer}/{index}")
    elif isinstance(value, float):
        if not math.isfinite(value):
            yield pointer, value
    elif value is not None and not isinstance(value, str | int):
        yield pointer, value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        seen = set()
        for key, _ in pairs:
            if key in seen:
                raise RepeatedKeyError(repetition(key))
            seen.add(key)
    return members
