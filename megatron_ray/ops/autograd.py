"""Defines the base class of autograd functions, with a typed `apply`."""

from typing import TYPE_CHECKING, Generic, TypeVar

import torch

Output = TypeVar("Output")


class AutogradFunction(torch.autograd.Function, Generic[Output]):
    """An autograd function whose `apply` returns `Output`.

    Subclasses name it: `class _Column(AutogradFunction[Tensor])`.
    """

    if TYPE_CHECKING:
        # For the type checker only. At run time `apply` is torch's own method, without an
        # extra call that torch.compile would have to trace.
        @classmethod
        def apply(cls, *args: object) -> Output:
            """Runs `forward` and records `backward`."""
            ...
