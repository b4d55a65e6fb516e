"""A config.json as a family reads it.

Owns: values with defaults, and refusals that name the key. Pure; must not know:
families.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from megatron_ray.config.problem import ConfigError


class Options:
    """The values of a config.json.

    Every method raises ConfigError with the key and the remedy.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def refuse(self, text: str) -> ConfigError:
        """The error to raise."""
        return ConfigError(f"{self.where}: {text}")

    def get(self, key: str, default: Any = None) -> Any:
        """A value; the default where it is missing or null."""
        found = self.values.get(key)
        return default if found is None else found

    def number(self, key: str, default: float | None = None) -> Any:
        """A number that must be there unless it has a default."""
        found = self.get(key, default)
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise self.refuse(f"{key} is {found!r}, a number is needed")
        return found

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        found = self.get(key, default)
        if not isinstance(found, bool):
            raise self.refuse(f"{key} is {found!r}, true or false is needed")
        return found

    def only(self, key: str, allowed: Iterable[Any], default: Any = None) -> Any:
        """A value that must be one of those that mean something here."""
        found = self.get(key, default)
        known = list(allowed)
        if found not in known:
            raise self.refuse(
                f"{key}={found!r} is not supported; known: "
                f"{', '.join(repr(value) for value in known)}"
            )
        return found
