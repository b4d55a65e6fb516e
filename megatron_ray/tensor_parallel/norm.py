"""Defines RMSNorm and LayerNorm, with weight gradients in slots.

Weights are replicated. Under sequence parallelism each rank processes its own tokens
only, and the parameter table marks the gradients as summed over tp; those of norms of
heads always are, since each rank has its own heads. Arithmetic is fp32 for any type of
activations. Inputs may be wider than weights and outputs. Must not know: the model,
groups.

Shapes: T tokens (or heads of tokens), H hidden (or head width).
"""

from typing import Any

import torch
from torch import Tensor, nn

from megatron_ray.ops.autograd import AutogradFunction
from megatron_ray.ops.differentiable_op import DifferentiableOp
from megatron_ray.ops.dtypes import to_fp32
from megatron_ray.ops.grad_slots import SlottedModule, deliver_computed_grad
from megatron_ray.tensor_parallel.layers import Shape


class RMSNorm(SlottedModule):
    """y = x / sqrt(mean(x^2) + eps) * w (Zhang and Sennrich 2019).

    With zero-centred weights (Gemma), times 1 + w.
    """

    def __init__(
        self,
        weight_shape: Shape,
        eps: float,
        *,
        dtype: torch.dtype,
        zero_centered: bool = False,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = zero_centered
        self.kernel = RMS_NORM
        self.weight = nn.Parameter(torch.empty(weight_shape, dtype=dtype))

    def forward(self, x_TH: Tensor) -> Tensor:
        """Returns the normalised rows."""
        return _RMSNorm.apply(x_TH, self.weight, self)

    def scale(self, weight: Tensor) -> Tensor:
        """Returns the factor of normalised activations.

        1 + weight in bf16 would lose most of the weight, so the sum is fp32.
        """
        if self.zero_centered:
            return to_fp32(weight) + 1
        return weight


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns y and 1 / sqrt(mean(x^2) + eps) [T, 1]."""
    x_fp32 = to_fp32(x)
    # vector_norm instead of mean(x*x): one pass without an intermediate [T, H].
    rstd = (
        torch.linalg.vector_norm(x_fp32, dim=-1, keepdim=True)
        .square_()
        .div_(x.shape[-1])
        .add_(eps)
        .rsqrt_()
    )
    normed: Tensor = x_fp32 * rstd
    return normed.mul_(weight).to(x.dtype), rstd


def _rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x and, in fp32, of the weight."""
    grad_fp32 = to_fp32(grad)
    normed = to_fp32(x) * rstd
    grad_times_normed = grad_fp32 * normed
    # With n the normed x: dx = rstd * (g w - n mean(g w n)). The mean over H is a
    # matrix-vector product, and what follows is done in place in n's memory.
    coefficient = torch.mv(grad_times_normed, to_fp32(weight)).div_(-x.shape[-1])
    grad_x = normed.mul_(coefficient.unsqueeze_(-1))
    grad_x = grad_x.addcmul_(grad_fp32, to_fp32(weight)).mul_(rstd)
    return grad_x.to(x.dtype), grad_times_normed.sum(0)


RMS_NORM = DifferentiableOp(_rms_norm, _rms_norm_backward)


class _RMSNorm(AutogradFunction[Tensor]):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, module: RMSNorm) -> Tensor:
        output, rstd = module.kernel.forward(x, module.scale(weight), module.eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.module = module
        normed: Tensor = output.to(weight.dtype)
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        module: RMSNorm = ctx.module
        grad_x, grad_weight = module.kernel.backward(grad, x, module.scale(weight), rstd)
        return grad_x, deliver_computed_grad(module, "weight", grad_weight), None


class LayerNorm(SlottedModule):
    """y = (x - mean) / sqrt(var + eps) * w + b."""

    def __init__(self, weight_shape: Shape, eps: float, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(weight_shape, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(weight_shape, dtype=dtype))

    def forward(self, x_TH: Tensor) -> Tensor:
        """Returns the normalised rows."""
        return _LayerNorm.apply(x_TH, self.weight, self.bias, self)


class _LayerNorm(AutogradFunction[Tensor]):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, module: LayerNorm
    ) -> Tensor:
        output, mean, rstd = torch.native_layer_norm(
            x, [x.shape[-1]], weight.to(x.dtype), bias.to(x.dtype), module.eps
        )
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.module = module
        return output.to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        module: LayerNorm = ctx.module
        # A gradient that the mask excludes is None and is not delivered.
        mask = [True, module.weight.requires_grad, module.bias.requires_grad]
        grad = grad.to(x.dtype).contiguous()
        weight = weight.to(x.dtype)
        bias = bias.to(x.dtype)
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
            grad, x, [x.shape[-1]], mean, rstd, weight, bias, mask
        )
        grad_weight = deliver_computed_grad(module, "weight", grad_weight)
        grad_bias = deliver_computed_grad(module, "bias", grad_bias)
        return grad_x, grad_weight, grad_bias, None
