"""Rotary position embedding (Su et al. 2021), rotating halves as Llama does. Owns: angles and the rotation of a fused qkv.

Reads position ids, never an offset from a rank, so any cut of the sequence is right. Must not know: parallelism.

Shapes: B batch, S sequence, N query heads, G key/value heads, D head width (all as held on this rank).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


def rotary_angles(position_ids_BS: Tensor, head_width: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each [B or 1, S, 1, D/2]; computed in fp32, cast to the activations' type."""
    exponents = torch.arange(0, head_width, 2, device=position_ids_BS.device, dtype=torch.float32) / head_width
    angles = position_ids_BS[:, :, None, None].float() * (1.0 / theta**exponents)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> None:
    """out = x rotated by direction x angle, without temporaries; shapes [B, S, heads, D]."""
    half = x.shape[-1] // 2
    x1, x2, out1, out2 = x[..., :half], x[..., half:], out[..., :half], out[..., half:]
    torch.mul(x1, cos, out=out1)
    out1.addcmul_(x2, sin, value=-direction)
    torch.mul(x2, cos, out=out2)
    out2.addcmul_(x1, sin, value=direction)


class RotateQKV(torch.autograd.Function):
    """Splits a fused [B, S, (N + 2 G) D] into rotated q [B, S, N, D], rotated k [B, S, G, D] and v [B, S, G, D].

    One function, so that the backward writes the three gradients straight into one fused buffer instead of concatenating.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, groups: int, head_width: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = _split(qkv, heads, groups, head_width)
        rotated_q, rotated_k = q.new_empty(q.shape), k.new_empty(k.shape)
        _rotate_into(rotated_q, q, cos, sin, 1.0)
        _rotate_into(rotated_k, k, cos, sin, 1.0)
        ctx.save_for_backward(cos, sin)
        ctx.sizes = heads, groups, head_width  # type: ignore[attr-defined]
        return rotated_q, rotated_k, v.clone()

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        heads, groups, head_width = ctx.sizes
        batch, sequence = grad_q.shape[:2]
        grad = grad_q.new_empty(batch, sequence, (heads + 2 * groups) * head_width)
        q, k, v = _split(grad, heads, groups, head_width)
        _rotate_into(q, grad_q, cos, sin, -1.0)
        _rotate_into(k, grad_k, cos, sin, -1.0)
        v.copy_(grad_v)
        return grad, None, None, None, None, None


def _split(qkv: Tensor, heads: int, groups: int, head_width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views [B, S, heads, D] of the three parts."""
    split = qkv.view(*qkv.shape[:-1], heads + 2 * groups, head_width)
    q, k, v = torch.split(split, [heads, groups, groups], dim=2)
    return q, k, v


def split_qkv(qkv: Tensor, heads: int, groups: int, head_width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The three parts unrotated, for models without rotary positions."""
    return _split(qkv, heads, groups, head_width)
