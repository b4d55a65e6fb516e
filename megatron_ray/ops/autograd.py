"""Defines the base class of all autograd functions, whose `apply` has a return type."""

from typing import TYPE_CHECKING, Generic, TypeVar

import torch

Output = TypeVar("Output")


class AutogradFunction(torch.autograd.Function, Generic[Output]):
    """An autograd function whose `apply` returns `Output`.

    Subclasses name it: `class _Column(AutogradFunction[Tensor])`.
    """

    if TYPE_CHECKING:
        # For the type checker only. At run time `apply` stays torch's own method: no
        # further call per layer, and nothing that torch.compile would have to trace.
        @classmethod
        def apply(cls, *args: object) -> Output:
            """Runs `forward` and records `backward`."""
            ...
