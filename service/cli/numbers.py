"""Parses options that are whole numbers, which are written as in a spec.

Must not know: commands.
"""

from collections.abc import Callable

import typer

from megatron_ray.config.parsing.numbers import whole_number


def at_least(minimum: int) -> Callable[[str], int]:
    """Returns the parser of a whole number such as 1000, 1e3 or 1_000.

    It raises typer.BadParameter with the value and an example.
    """

    # The name is shown by --help.
    def integer(text: str) -> int:
        # Defaults are parsed too.
        number = whole_number(str(text))
        if number is None:
            raise typer.BadParameter(
                f"{text[:80]!r} is no whole number; write it as 1000 or 1e3"
            )
        if number < minimum:
            raise typer.BadParameter(f"{text} is below {minimum}, the smallest value")
        return number

    return integer
