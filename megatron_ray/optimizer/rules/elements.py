"""Defines what an elementwise rule is called with.

Owns: the types, and weight decay. Must not know: any rule, buffers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from megatron_ray.optimizer.update_rule import UpdateRule


@dataclass(frozen=True)
class Elements:
    """Some weights and their state; all tensors have one shape."""

    weights: Tensor
    state: Mapping[str, Tensor]
    """By the names of `OptimizerKind.state`; zeros before the first update."""


@dataclass(frozen=True)
class Rates:
    """The numbers of one update."""

    lr: float
    decay: float
    """Share of the weights that is subtracted; 0 where decay is part of the gradient."""
    count: Tensor
    """Number of this update, from 1, as a scalar on the device."""

    def decayed(self, weights: Tensor) -> Tensor:
        """Returns the weights after weight decay."""
        if self.decay == 0:
            return weights
        return weights * (1 - self.decay)


Rule = Callable[[Elements, Tensor, UpdateRule, Rates], Elements]
"""Returns what becomes of elements with a gradient."""


def mean(average: Tensor, value: Tensor, beta: float) -> Tensor:
    """Returns an exponential moving average that includes a new value."""
    return beta * average + (1 - beta) * value
