"""Words pydantic's errors as short sentences about one value.

Owns: the wording of each kind of error. Must not know: HTTP, job specs.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_ray.exceptions import redacted

MAX_VALUE_CHARS = 80
"""Characters of a wrong value that a message repeats."""
_MAX_READ_CHARS = 8192
MAX_LISTED_NAMES = 20
"""Known values that a message lists; of more it names the nearest one."""

# By pydantic's error type; braces name entries of the error's `ctx`.
_TEMPLATES = {
    "missing": "is required",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing_size": "must be a whole number with fewer digits",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be a string",
    "string_unicode": "must be text of whole characters",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "dict_type": "must be a JSON object",
    "model_type": "must be a JSON object",
    "model_attributes_type": "must be a JSON object",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "string_pattern_mismatch": "must match the pattern {pattern}",
    "string_too_short": "must have {min_length} or more characters",
    "string_too_long": "must have {max_length} or fewer characters",
    "too_short": "must have {min_length} or more items",
    "too_long": "must have {max_length} or fewer items",
}

_EXAMPLES = {
    "int_parsing": "write it as 1000 or 1e3",
    "int_type": "write it as 1000 or 1e3",
    "int_from_float": "write it as 1000 or 1e3",
    "float_parsing": "write it as 0.001 or 1e-3",
    "float_type": "write it as 0.001 or 1e-3",
}
"""How to write a value that is right."""


def plain_message(error: Mapping[str, Any]) -> str:
    """Returns what must hold for the value, without the name of the field.

    Errors raised by our own validators keep their text, which names the remedy.
    """
    template = _TEMPLATES.get(error["type"])
    if error["type"] in ("enum", "literal_error"):
        return _one_of(str(error["ctx"]["expected"]), error.get("input"))
    # Our own validators, and rare kinds, whose text is good enough.
    if template is None:
        message = str(error["msg"]).removeprefix("Value error, ")
        return message[:1].lower() + message[1:]
    limits = dict(error.get("ctx", {}))
    for name, limit in limits.items():
        # A limit of a float field reads as it is written in the code: 0 and not 0.0.
        if isinstance(limit, float):
            limits[name] = f"{limit:g}"
    return template.format(**limits)


def suggestion(name: str, known: Iterable[str]) -> str | None:
    """Returns a question that names the closest known name; None without a close one."""
    # Only the beginning is compared: no name is long, and the cost grows with the length.
    close = difflib.get_close_matches(name[:MAX_VALUE_CHARS], known, n=1)
    if not close:
        return None
    return f"did you mean {close[0]!r}?"


def _one_of(expected: str, value: Any) -> str:
    """Returns which values may be sent: all of them, or of many the nearest one."""
    names = re.findall(r"'([^']*)'", expected)
    close = difflib.get_close_matches(str(value)[:MAX_VALUE_CHARS], names, n=1)
    if close and len(names) > MAX_LISTED_NAMES:
        return f"must be one of {len(names)} known values, such as {close[0]!r}"
    return f"must be {expected}"


def refusal(error: Mapping[str, Any], value: Any, message: str | None = None) -> str:
    """Returns what must hold, the wrong value, and how to write one in a spec.

    `message` replaces that of `plain_message`.
    """
    text = f"{message or plain_message(error)}, got {short_value(value)}"
    example = _EXAMPLES.get(error["type"])
    if example is not None:
        return f"{text}; {example}"
    # Numbers and the like are text within quotes.
    if error["type"] == "string_type" and isinstance(value, int | float):
        return f'{text}; put it in quotes: "{short_value(value)}"'
    return text


def short_value(value: Any) -> str:
    """Returns a wrong value as a message may repeat it: as JSON names it, and cut."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    # Quotes show where a string ends, and that it is one.
    if isinstance(value, str):
        value = value[:_MAX_READ_CHARS]
    # Before it is cut, which could cut off what shows that a URI has a secret in it.
    text = redacted(repr(value))
    if len(text) > MAX_VALUE_CHARS:
        return text[:MAX_VALUE_CHARS] + "..."
    return text
