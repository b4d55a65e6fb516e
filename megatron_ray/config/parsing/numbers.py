"""Reads whole numbers as people write them.

Owns: the spellings, which are the same in YAML, JSON and --set. Pure. Must not know: any
field.
"""

import re
from decimal import Decimal

MAX_DIGITS = 100
"""Characters of a number: no field takes a longer one, and the cost of reading it would be
the square of its length."""
_DECIMAL = re.compile(r"[-+]?[0-9]+(_[0-9]+)*(\.[0-9]*)?([eE][-+]?[0-9]{1,3})?")
_PREFIXED = re.compile(r"[-+]?0([xX][0-9a-fA-F_]+|[oO][0-7_]+|[bB][01_]+)")


def whole_number(text: str) -> int | None:
    """Returns the whole number that a text stands for, such as `1000`, `1e3` or `0x3e8`.

    None for every other text, `1.5` included.
    """
    text = text.strip()
    if len(text) > MAX_DIGITS:
        return None
    if _PREFIXED.fullmatch(text):
        try:
            return int(text, 0)
        except ValueError:
            return None  # as `0x_`
    if not _DECIMAL.fullmatch(text):
        return None
    # Exact, which a float is not beyond 2^53.
    number = Decimal(text.replace("_", ""))
    if number != number.to_integral_value():
        return None
    return int(number)


def int_or_text(text: str) -> int | str:
    """Returns the whole number of digits, or the text itself when no field takes it.

    For readers of JSON: the field then refuses it by name.
    """
    if len(text) > MAX_DIGITS:
        return text
    return int(text)
