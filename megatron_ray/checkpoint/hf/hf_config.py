"""Reads values of a config.json, with defaults and errors that name the key.

Pure. Must not know: families.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from megatron_ray.config.problem import ConfigError


class HfConfig:
    """The values of a config.json.

    Methods raise ConfigError with the key and the remedy.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where
        """Path or URI of the file, for errors."""

    def error(self, message: str) -> ConfigError:
        """Returns the error to raise, with the file's path before the message."""
        return ConfigError(f"{self.where}: {message}")

    def get(self, key: str, default: Any = None) -> Any:
        """Returns a value, or the default where it is missing or null."""
        value = self.values.get(key)
        return default if value is None else value

    def number(self, key: str, default: float | None = None) -> Any:
        """Returns a number; without a default it must be given."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(f"{key} is {value!r}, a number is needed")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Returns true or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(f"{key} is {value!r}, true or false is needed")
        return value

    def one_of(self, key: str, allowed: Iterable[Any], default: Any = None) -> Any:
        """Returns a value that must be one of the supported ones."""
        value = self.get(key, default)
        known = list(allowed)
        if value not in known:
            raise self.error(
                f"{key}={value!r} is not supported; known: {', '.join(map(repr, known))}"
            )
        return value
