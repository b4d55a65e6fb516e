"""A callback as a package of a user's own adds it: the share of weights that a step makes
larger.
"""

from importlib.metadata import EntryPoint, EntryPoints
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from megatron_ray.config.base import Config
from megatron_ray.config.callbacks import installed
from megatron_ray.config.callbacks.installed import CallbackKind
from megatron_ray.optimizer.counted_parts import counted_parts
from megatron_ray.optimizer.step_sums import StepSums
from megatron_ray.training.callbacks.protocol import Callback, CallbackContext, Partials


class GrowthOptions(Config):
    """Options of the callback."""

    least: float = 0.0
    """Growth that counts."""


class Growth(Callback):
    names = ("share", "elements")

    def __init__(self, context: CallbackContext, options: Config | None) -> None:
        assert isinstance(options, GrowthOptions)
        self.least = options.least
        self.parts = list(counted_parts(context.optimizer, context.mesh.tp_rank))
        self.before: list[Tensor] = []

    def after_backward(self, sums: StepSums) -> None:
        self.before = [part.main.abs() for part in self.parts]

    def after_update(self) -> Partials:
        grown = torch.zeros(2, dtype=torch.float64)
        for part, before in zip(self.parts, self.before, strict=True):
            grown[0] += (part.main.abs() - before > self.least).sum()
            grown[1] += before.numel()
        return Partials(grown)

    def finish(self, reduced: Partials) -> Tensor:
        grown, elements = reduced.sums
        return torch.stack([grown / elements, elements])


def two_of_a_name(context: CallbackContext, options: Config | None) -> Callback:
    callback = Callback()
    callback.names = ["same", "same"]
    return callback


def bad_name(context: CallbackContext, options: Config | None) -> Callback:
    callback = Callback()
    callback.names = ["with, comma"]
    return callback


def too_many(context: CallbackContext, options: Config | None) -> Callback:
    callback = Callback()
    callback.names = [f"number_{index}" for index in range(3000)]
    return callback


def no_callback(context: CallbackContext, options: Config | None) -> Callback:
    return cast(Callback, 7)


KINDS = {
    "growth": CallbackKind(f"{__name__}:Growth", GrowthOptions),
    "lost": CallbackKind("no_such_package.callbacks:Lost"),
    "no_kind": "text",
    **{
        name: CallbackKind(f"{__name__}:{name}")
        for name in ("two_of_a_name", "bad_name", "too_many", "no_callback")
    },
}


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes KINDS the entry points of an installed package, and a broken one."""
    group = installed.ENTRY_POINTS
    names = [*KINDS, "broken"]
    points = EntryPoints(EntryPoint(name, f"package:{name}", group) for name in names)

    def load(self: EntryPoint) -> Any:
        if self.attr == "broken":
            raise RuntimeError("a library is missing")
        return KINDS[self.attr]

    monkeypatch.setattr(installed, "entry_points", lambda group: points)
    monkeypatch.setattr(EntryPoint, "load", load)
