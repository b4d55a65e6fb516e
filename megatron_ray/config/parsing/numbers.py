"""Reads whole numbers as people write them.

Owns: the spellings, which are the same in YAML, JSON and --set. Pure. Must not know: any
field.
"""

import re
from decimal import Decimal

_DECIMAL = re.compile(r"[-+]?[0-9]+(_[0-9]+)*(\.[0-9]*)?([eE][-+]?[0-9]{1,2})?")
_PREFIXED = re.compile(r"[-+]?0([xX][0-9a-fA-F_]+|[oO][0-7_]+|[bB][01_]+)")


def whole_number(text: str) -> int | None:
    """Returns the whole number that a text stands for, such as `1000`, `1e3` or `0x3e8`.

    None for every other text, `1.5` included.
    """
    text = text.strip()
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
