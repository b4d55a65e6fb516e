"""Reads the callbacks of installed packages by name.

Owns: the entry points. Torch-free, so that specs are read without torch. Must not know:
what a callback does.

An installed package adds a callback by an entry point of group `megatron_ray.callbacks`,
which names a `CallbackKind`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from pydantic import ValidationError

from megatron_ray.config.base import Config
from megatron_ray.config.errors.messages import plain_message, suggestion

ENTRY_POINTS = "megatron_ray.callbacks"


@dataclass(frozen=True)
class CallbackKind:
    """What must be known of a callback before anything runs."""

    callback: str
    """`module:name` of the function (or class) that makes it, which only ranks import; see
    `megatron_ray.training.callbacks.protocol.MakeCallback`."""
    options: type[Config] | None = None
    """Its own fields in a spec; None: it has none."""

    def parse(self, values: Mapping[str, Any]) -> Config | None:
        """Returns its options; None without any. Raises ValueError for wrong ones."""
        if self.options is None:
            if values:
                raise ValueError(f"has no options, got {', '.join(values)}; leave them out")
            return None
        try:
            return self.options.model_validate(dict(values))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "options"
            raise ValueError(f"options: {where} {plain_message(first)}") from error


def callback_kind(name: str) -> CallbackKind:
    """Returns the callback of an installed package.

    Raises ValueError for an unknown name, and for an entry point that is broken.
    """
    # Read only for specs with such a callback, because it opens the metadata of every
    # installed package.
    installed = entry_points(group=ENTRY_POINTS)
    for entry_point in installed.select(name=name):
        try:
            loaded = entry_point.load()
        except Exception as error:
            raise ValueError(
                f"the entry point {entry_point.value!r} of callback {name!r} cannot be "
                f"loaded: {type(error).__name__}: {error}; repair or remove its package"
            ) from error
        if not isinstance(loaded, CallbackKind):
            raise ValueError(
                f"the entry point {entry_point.value!r} of callback {name!r} is no "
                "CallbackKind"
            )
        return loaded
    raise ValueError(f"there is no callback {name!r}; {_hint(name, installed.names)}")


def _hint(name: str, installed: set[str]) -> str:
    known = sorted(installed)
    if not known:
        return (
            f"no installed package has an entry point of group {ENTRY_POINTS}; install it "
            "where the service runs and on every node"
        )
    return suggestion(name, known) or f"installed: {', '.join(known)}"
