"""Losses that are trained on beside the model's own.

Owns: how their gradients join the backward pass, and their sums over a step. Must not
know: which, who reports them.
"""

from typing import Any

import torch
from torch import Tensor, nn


class AuxLoss(nn.Module):
    """One place where such a loss arises.

    What it adds up to is counted in the backward pass, which every microbatch that is
    trained on goes through once, recomputed or not; it stays on the device until
    somebody takes it.
    """

    def __init__(self, kind: str, divisor: float) -> None:
        """`kind`: what it is reported as; `divisor`: what makes a sum over all places
        and ranks that number.
        """
        super().__init__()
        self.kind = kind
        self._divisor = divisor
        self._total: Tensor | None = None

    def forward(self, to: Tensor, loss: Tensor) -> Tensor:
        """`to` as it is; the backward pass adds the gradient of the loss, a scalar.

        As everywhere the gradient of a loss is taken to be one: the scaling by tokens
        comes in the end.
        """
        return _Attach.apply(to, loss, self)  # type: ignore[no-any-return, no-untyped-call]

    def count(self, loss: Tensor) -> None:
        """Adds one microbatch's."""
        self._total = loss.double() if self._total is None else self._total + loss

    def take(self) -> Tensor | None:
        """This place's part since it was taken before, an fp64 scalar; None where there
        was nothing.
        """
        total = self._total
        self._total = None
        return None if total is None else total / self._divisor


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, to: Tensor, loss: Tensor, place: AuxLoss) -> Tensor:
        ctx.save_for_backward(loss)
        ctx.place = place
        return to.clone()  # and no view: ZeRO-3 hangs its hooks on what a stage returns

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (loss,) = ctx.saved_tensors
        ctx.place.count(loss)
        return grad, torch.ones_like(loss), None
