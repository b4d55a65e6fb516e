"""Reads JSON that a person may have written.

Owns: what JSON or YAML allows and a spec does not: fields given twice, infinities, dates,
values that contain themselves. Pure. Must not know: any field.
"""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from megatron_ray.config.errors.spec_problems import pointer_to
from megatron_ray.config.parsing.numbers import int_or_text
from megatron_ray.exceptions import InputError

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""The escape of one half of a character beyond the first 65,536."""


class UnusableJSONError(InputError, ValueError):
    """A document is JSON, and a part of it would be ignored or cannot be stored."""

    def __init__(self, detail: str, pointer: str = "") -> None:
        super().__init__(detail)
        self.pointer = pointer
        """Where it is, if that is one place (RFC 6901)."""


def read_json(content: str | bytes) -> Any:
    """Returns the value of a JSON document.

    Raises json.JSONDecodeError, UnicodeDecodeError, and UnusableJSONError for a key that
    an object has twice and for halves of characters.
    """
    if isinstance(content, bytes):
        content = content.decode(json.detect_encoding(content))
    value = json.loads(content, object_pairs_hook=_object, parse_int=int_or_text)
    if _SURROGATE.search(content):
        _require_unicode(value)
    return value


def _require_unicode(value: Any, parts: tuple[str | int, ...] = ()) -> None:
    """Raises UnusableJSONError for a text or key that has a half of a character."""
    if isinstance(value, dict):
        for key, member in value.items():
            _require_unicode(key, parts)
            _require_unicode(member, (*parts, key))
    elif isinstance(value, list):
        for index, member in enumerate(value):
            _require_unicode(member, (*parts, index))
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = value[error.start]
            detail = f"{half!r} is one half of a character; write the character itself"
            raise UnusableJSONError(detail, pointer_to(parts)) from error


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
                raise UnusableJSONError(repetition(key))
            seen.add(key)
    return members
