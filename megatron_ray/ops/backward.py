"""A backward pass that starts from a given gradient.

Owns: that. Must not know: who wants one.

torch's own way to hand over a gradient compares shapes as symbols, for which it imports
sympy: a second of a rank's start.
"""

from typing import Any

import torch
from torch import Tensor


class Backward:
    """Of one output, whose graph it keeps but not its values."""

    def __init__(self, output: Tensor) -> None:
        self._gradient: list[Tensor] = []
        self._start: Tensor = _Start.apply(output, self._gradient)  # type: ignore[no-untyped-call]

    def run(self, gradient: Tensor) -> None:
        """Once: from the output's gradient to everything below."""
        self._gradient.append(gradient)
        torch.autograd.backward(self._start)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, gradient: list[Tensor]) -> Tensor:
        ctx.gradient = gradient
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient.pop(), None
