"""Losses that are trained on and not reported. Owns: how their gradients join the backward pass. Must not know: which."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


def attach_loss(to: Tensor, loss: Tensor) -> Tensor:
    """`to` as it is; the backward pass adds the gradient of the loss, which appears in no reported number. As everywhere the gradient of a
    loss is taken to be one: the scaling by tokens comes in the end."""
    return _AttachLoss.apply(to, loss)  # type: ignore[no-any-return, no-untyped-call]


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, to: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return to.clone()  # and no view: ZeRO-3 hangs its hooks on what a stage returns

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss)
