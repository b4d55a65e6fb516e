"""Causal attention in which a token sees itself and the few tokens before it
(Longformer, Beltagy et al. 2020; Mistral), by stripes.

A stripe is some query rows and the keys that any of them sees, so work and memory grow
with sequence x window. Keeps only q, k, v, the output and its logarithms of sums for
the backward. Must not know: positions, caches, ranks.

Shapes: B batch, S sequence, N query heads, G key/value heads, D head width, R rows and
C columns of a stripe.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ray.ops.attention import fused
from megatron_ray.ops.attention.fused import band, band_bias

# Fewer rows are slow products.
_ROWS = 128
# CUDA's kernels copy a mask first whose rows are no multiple of this.
_ALIGNED = 16


@dataclass(frozen=True)
class Stripe:
    """Query rows, and keys among which are all that they see."""

    rows: slice
    columns: slice

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, columns, and how far the first row is behind the first column."""
        first = self.rows.start - self.columns.start
        return (
            self.rows.stop - self.rows.start,
            self.columns.stop - self.columns.start,
            first,
        )


def stripes(sequence: int, window: int) -> Iterator[Stripe]:
    """All rows, a quarter of a window at a time: about a fifth of the scores are made
    in vain.
    """
    rows = max(_ROWS, window // 4 // _ALIGNED * _ALIGNED)
    for first in range(0, sequence, rows):
        end = min(first + rows, sequence)
        yield Stripe(
            slice(first, end), slice(max(0, first - window + 1) // _ALIGNED * _ALIGNED, end)
        )


def windowed_attention(
    q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, window: int, *, wide: bool
) -> Tensor:
    """Returns softmax(q k^T / sqrt(D)) v where a query sees the keys up to its own,
    `window` of them: [B, N, S, D]. `wide`: bf16 is multiplied in fp32.
    """
    return _Windowed.apply(q_BNSD, k_BGSD, v_BGSD, window, wide)  # type: ignore[no-any-return, no-untyped-call]


def masked_attention(q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, window: int) -> Tensor:
    """Returns the same by torch's own attention, which on CUDA has fast kernels for a
    mask.
    """
    k, v = (
        fused.for_each_query_head(x, q_BNSD) for x in (k_BGSD, v_BGSD)
    )  # a mask and shared heads have no fast kernel
    attended = []
    for stripe in stripes(q_BNSD.shape[2], window):
        q = q_BNSD[:, :, stripe.rows]
        keys = k[:, :, stripe.columns]
        values = v[:, :, stripe.columns]
        mask = band(*stripe.shape, window, q.device)
        attended.append(
            nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        )
    return torch.cat(attended, 2)


class _Windowed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int, wide: bool
    ) -> Tensor:
        dtype = torch.promote_types(q.dtype, torch.float32)
        output = torch.empty_like(q, dtype=dtype)
        lse = torch.empty(q.shape[:3], dtype=dtype, device=q.device)
        for stripe in stripes(q.shape[2], window):
            rows = stripe.rows
            columns = stripe.columns
            bias = band_bias(*stripe.shape, window, q)
            parts = (q[:, :, rows], k[:, :, columns], v[:, :, columns])
            found = fused.forward(*parts, causal=False, bias=bias, wide=wide)
            output[:, :, rows], lse[:, :, rows] = found
        attended = fused.tokens_first(output, q.dtype)
        ctx.save_for_backward(q, k, v, attended, lse)
        ctx.window = window
        ctx.wide = wide
        return attended

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, lse = ctx.saved_tensors
        # Every stripe adds to the keys it sees; many roundings to bf16 would add up.
        grad_q, grad_k, grad_v = (
            torch.empty_like(q),
            *(torch.zeros_like(x, dtype=lse.dtype) for x in (k, v)),
        )
        for stripe in stripes(q.shape[2], ctx.window):
            rows = stripe.rows
            columns = stripe.columns
            bias = band_bias(*stripe.shape, ctx.window, q)
            of_q, of_k, of_v = fused.backward(
                *(grad[:, :, rows], q[:, :, rows], k[:, :, columns], v[:, :, columns]),
                *((output[:, :, rows], lse[:, :, rows]), False, bias),
                wide=ctx.wide,
            )
            grad_q[:, :, rows] = of_q
            grad_k[:, :, columns] += of_k
            grad_v[:, :, columns] += of_v
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None
