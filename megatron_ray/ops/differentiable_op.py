"""Holds a function of tensors together with its gradient.

Autograd functions of layers call such a pair, so that it can be exchanged for another
that computes the same, e.g. a compiled one. Must not know: autograd, modules.
"""

from collections.abc import Callable
from typing import Any, NamedTuple


class DifferentiableOp(NamedTuple):
    """A forward and its backward; their arguments are described with their layer."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
