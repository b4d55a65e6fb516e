"""What can be wrong with a config.

Owns: the shape of that statement. Must not know: any rule.
"""

from dataclasses import dataclass

from megatron_ray.exceptions import InputError


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a spec."""

    pointer: str
    """JSON pointer of the field to change."""
    code: str
    """Stable name of the rule."""
    detail: str
    """What is wrong, with the numbers, and what to do about it."""


class ConfigError(InputError, ValueError):
    """A config that contradicts itself, its data or its world: the user's to mend, so
    nothing is gained by trying again.
    """
