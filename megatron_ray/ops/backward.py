"""Runs a backward pass that starts from a given gradient.

torch's `backward(gradient=...)` compares shapes as symbols and imports sympy for it,
which takes a second of a rank's start.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_ray.ops.autograd import AutogradFunction


class Backward:
    """The backward pass from one output; keeps its graph but not its storage."""

    def __init__(self, output: Tensor) -> None:
        self._gradient: list[Tensor] = []
        self._start = _Start.apply(output, self._gradient)

    def run(self, gradient: Tensor) -> None:
        """Runs the backward pass once, from the gradient of the output."""
        self._gradient.append(gradient)
        torch.autograd.backward(self._start)


class _Start(AutogradFunction[Tensor]):
    """A scalar computed from the output; its backward returns the stored gradient.

    torch needs no initial gradient for a scalar.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, gradient: list[Tensor]) -> Tensor:
        ctx.gradient = gradient
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient.pop(), None
