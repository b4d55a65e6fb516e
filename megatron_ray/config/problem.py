"""Defines how an invalid config is reported: as a value, and as an exception.

Must not know: any rule.
"""

from dataclasses import dataclass

from megatron_ray.exceptions import InputError, redacted


@dataclass(frozen=True)
class Problem:
    """One violated rule of a spec."""

    pointer: str
    """JSON pointer of the field to change."""
    code: str
    """Stable name of the rule."""
    detail: str
    """What is wrong, with the numbers, and the remedy."""

    def __post_init__(self) -> None:
        # Details repeat what users wrote, which may be a URI with a secret in it.
        object.__setattr__(self, "detail", redacted(self.detail))


class ConfigError(InputError, ValueError):
    """A config contradicts itself, its data or the world size.

    Only the user can fix it, so the run must not be retried.
    """
