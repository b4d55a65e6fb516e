"""Computes causal attention of bf16 inputs on CPUs without bf16 products.

Owns: the fused kernel in fp32; only bf16 tensors are saved for the backward. Must not
know: positions, caches, ranks.

torch's own function takes 7 times as long on these CPUs, forward and backward.

Shapes: B batch, S sequence, N query heads, G key/value heads, D head width.
"""

from typing import Any

from torch import Tensor

from megatron_ray.ops.attention import fused
from megatron_ray.ops.autograd import AutogradFunction


def fp32_causal_attention(q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
    """Returns causal softmax(q k^T / sqrt(D)) v.

    The result is [B, N, S, D], in memory [B, S, N, D].
    """
    return _Fp32Attention.apply(q_BNSD, k_BGSD, v_BGSD)


class _Fp32Attention(AutogradFunction[Tensor]):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # The fp32 copies of q, k and v are freed after the kernel.
        wide, lse = fused.forward(q, k, v, causal=True, bias=None, in_fp32=True)
        output = fused.tokens_first(wide, q.dtype)
        ctx.save_for_backward(q, k, v, output, lse)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v, output, lse = ctx.saved_tensors
        grad_q, grad_k, grad_v = fused.backward(
            grad, q, k, v, (output, lse), causal=True, bias=None, in_fp32=True
        )
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)
