"""A function of tensors together with its gradient.

Owns: that pair, as the autograd functions of layers call it, so that what computes can
be exchanged for another that computes the same. Must not know: autograd, modules.
"""

from collections.abc import Callable
from typing import Any, NamedTuple


class DifferentiableOp(NamedTuple):
    """What each takes and returns is said where its layer is."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
