"""RMSNorm and LayerNorm whose weight gradients go to slots.

Owns: their forward and backward. Must not know: the model.

Weights are whole on every rank; under sequence parallelism each rank sees its own
tokens only, and the parameter table says that the gradients are then summed over tp;
those of norms of heads always are, since each rank sees its heads only. Arithmetic is
fp32 whatever the type of the activations. Shapes: T tokens (or heads of tokens), H
hidden (or head width).
"""

from typing import Any

import torch
from torch import Tensor, nn

from megatron_ray.distributed.collectives import Group
from megatron_ray.ops.differentiable_op import DifferentiableOp
from megatron_ray.ops.dtypes import to_fp32
from megatron_ray.ops.grad_slots import SlottedModule, deliver


class RMSNorm(SlottedModule):
    """y = x / sqrt(mean(x^2) + eps) * w (Zhang and Sennrich 2019); times 1 + w where
    weights are centred on zero (Gemma).
    """

    def __init__(
        self,
        width: int,
        eps: float,
        *,
        group: Group,
        sequence_parallel: bool,
        dtype: torch.dtype,
        zero_centered: bool = False,
    ) -> None:
        super().__init__(group, sequence_parallel)
        self.eps = eps
        self.zero_centered = zero_centered
        self.kernel = RMS_NORM
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype))

    def forward(self, x_TH: Tensor) -> Tensor:
        return _RMSNorm.apply(x_TH, self.weight, self)  # type: ignore[no-any-return, no-untyped-call]

    def scale(self, weight: Tensor) -> Tensor:
        """What normed activations are multiplied by; 1 + weight would lose most of a
        bf16 weight, so it is wide.
        """
        return to_fp32(weight) + 1 if self.zero_centered else weight


class LayerNorm(SlottedModule):
    """y = (x - mean) / sqrt(var + eps) * w + b."""

    def __init__(
        self,
        width: int,
        eps: float,
        *,
        group: Group,
        sequence_parallel: bool,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(group, sequence_parallel)
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(width, dtype=dtype))

    def forward(self, x_TH: Tensor) -> Tensor:
        return _LayerNorm.apply(x_TH, self.weight, self.bias, self)  # type: ignore[no-any-return, no-untyped-call]


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y, 1 / sqrt(mean(x^2) + eps) [T, 1])."""
    wide = to_fp32(x)
    # vector_norm and not mean(x*x): one pass, nothing of size [T, H] in between.
    rstd = (
        torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        .square_()
        .div_(x.shape[-1])
        .add_(eps)
        .rsqrt_()
    )
    normed: Tensor = wide * rstd
    return normed.mul_(weight).to(x.dtype), rstd


def _rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """(gradient of x, that of the weight in fp32)."""
    grad_wide = to_fp32(grad)
    normed = to_fp32(x) * rstd
    projected = grad_wide * normed
    # dx = rstd * (g w - n mean(g w n))
    coefficient = torch.mv(projected, to_fp32(weight)).div_(-x.shape[-1]).unsqueeze_(-1)
    grad_x = normed.mul_(coefficient).addcmul_(grad_wide, to_fp32(weight)).mul_(rstd)
    return grad_x.to(x.dtype), projected.sum(0)


RMS_NORM = DifferentiableOp(_rms_norm, _rms_norm_backward)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, module: RMSNorm) -> Tensor:
        output, rstd = module.kernel.forward(x, module.scale(weight), module.eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.module = module
        return output  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        grad_x, grad_weight = ctx.module.kernel.backward(
            grad, x, ctx.module.scale(weight), rstd
        )
        return (
            grad_x,
            deliver(ctx.module, "weight", grad_weight) if weight.requires_grad else None,
            None,
        )


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, module: LayerNorm
    ) -> Tensor:
        output, mean, rstd = torch.native_layer_norm(
            x, [x.shape[-1]], weight, bias, module.eps
        )
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.module = module
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        mask = [True, weight.requires_grad, bias.requires_grad]
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
            grad.contiguous(), x, [x.shape[-1]], mean, rstd, weight, bias, mask
        )
        delivered_weight = (
            deliver(ctx.module, "weight", grad_weight) if weight.requires_grad else None
        )
        delivered_bias = (
            deliver(ctx.module, "bias", grad_bias) if bias.requires_grad else None
        )
        return grad_x, delivered_weight, delivered_bias, None
