"""Replaces what a module of the model computes.

Must not know: what it computes instead.
"""

from collections.abc import Callable

from torch import Tensor, nn


def replace_forward(module: nn.Module, forward: Callable[..., Tensor]) -> None:
    """Replaces a module's forward.

    A wrapper module would change the names of its parameters, which must match the
    parameter table.
    """
    module.forward = forward
