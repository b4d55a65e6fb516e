"""Attaches auxiliary losses, which are trained in addition to the model's loss.

Owns: how their gradients join the backward pass, and their sums over a step. Must not
know: the kinds of losses, reports.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ray.ops.autograd import AutogradFunction


class AuxLoss(nn.Module):
    """One auxiliary loss of one layer (Megatron-LM: `MoEAuxLossAutoScaler`).

    It is summed in the backward pass, which every microbatch runs exactly once, with or
    without recomputation. The sum stays on the device until `take`.
    """

    def __init__(self, kind: str, divisor: float) -> None:
        """Creates the loss of one layer.

        `kind` is its reported name. `divisor` converts a sum over all layers and ranks
        to the reported number.
        """
        super().__init__()
        self.kind = kind
        self._divisor = divisor
        self.grad_scale: Callable[[], Tensor] | None = None
        """Factor of the gradient, where the losses are scaled."""
        self._total: Tensor | None = None

    def forward(self, activations: Tensor, loss: Tensor) -> Tensor:
        """Returns `activations` unchanged; their backward pass adds d(loss), a scalar.

        The gradient of a loss is one, or `grad_scale`, since division by the tokens of
        the step happens at its end.
        """
        return _Attach.apply(activations, loss, self)

    def count(self, loss: Tensor) -> None:
        """Adds one microbatch's loss to the sum."""
        if self._total is None:
            # fp64, since this is summed over all microbatches of a step.
            self._total = torch.zeros((), dtype=torch.float64, device=loss.device)
        # In place, because a CUDA graph counts in the memory that it was recorded with.
        self._total += loss

    def take(self) -> Tensor | None:
        """Returns this layer's share since the last call, and starts a new sum.

        The share is an fp64 scalar on the device; None when nothing was ever counted.
        """
        if self._total is None:
            return None
        share = self._total / self._divisor
        self._total.zero_()
        return share


class _Attach(AutogradFunction[Tensor]):
    @staticmethod
    def forward(ctx: Any, activations: Tensor, loss: Tensor, aux_loss: AuxLoss) -> Tensor:
        ctx.save_for_backward(loss)
        ctx.aux_loss = aux_loss
        # A copy instead of a view, because ZeRO-3 attaches hooks to a stage's output.
        return activations.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (loss,) = ctx.saved_tensors
        # Counted here, because a recomputed forward runs twice.
        aux_loss: AuxLoss = ctx.aux_loss
        aux_loss.count(loss)
        grad_loss = torch.ones_like(loss)
        if aux_loss.grad_scale is not None:
            grad_loss *= aux_loss.grad_scale()
        return grad, grad_loss, None
