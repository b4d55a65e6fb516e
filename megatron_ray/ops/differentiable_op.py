"""Holds a function of tensors together with its gradient.

Autograd functions of layers call such a pair, so that it can be replaced by an
equivalent one, e.g. a compiled one. Must not know: autograd, modules.
"""

from collections.abc import Callable
from typing import Any, NamedTuple


class DifferentiableOp(NamedTuple):
    """A forward and its backward function, with the arguments that its layer documents."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
