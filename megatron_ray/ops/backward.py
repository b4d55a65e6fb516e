"""Runs a backward pass that starts from a given gradient.

torch's own argument for it (`backward(gradient=...)`) compares shapes as symbols, for
which it imports sympy: a second of a rank's start.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_ray.ops.autograd import AutogradFunction


class Backward:
    """The backward pass from one output; keeps its graph, but not its values."""

    def __init__(self, output: Tensor) -> None:
        self._gradient: list[Tensor] = []
        self._start = _Start.apply(output, self._gradient)

    def run(self, gradient: Tensor) -> None:
        """Runs it once, from the gradient of the output."""
        self._gradient.append(gradient)
        torch.autograd.backward(self._start)


class _Start(AutogradFunction[Tensor]):
    """A scalar above the output, whose backward returns the gradient put in the list.

    From a scalar torch starts without a gradient of the caller's.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, gradient: list[Tensor]) -> Tensor:
        ctx.gradient = gradient
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient.pop(), None
