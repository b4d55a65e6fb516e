"""Computes causal attention within a window of tokens, stripe by stripe.

Owns: the keys that a stripe of queries needs. Must not know: positions, caches, ranks.

A token attends to itself and the tokens of the window before it (Longformer, Beltagy et
al. 2020; Mistral). A stripe is a range of query rows and the keys that any of them
attends to, so work and memory grow with sequence x window. Saves only q, k, v, the
output and its log-sum-exp for the backward.

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
from megatron_ray.ops.autograd import AutogradFunction

# Fewer rows make products slow.
_ROWS = 128
# CUDA's kernels copy a mask unless its row length is a multiple of this.
_ALIGNED = 16


@dataclass(frozen=True)
class Stripe:
    """Query rows, and columns that include all keys they attend to."""

    rows: slice
    columns: slice

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, columns, and the distance from the first column to the first row."""
        num_rows = self.rows.stop - self.rows.start
        num_columns = self.columns.stop - self.columns.start
        return num_rows, num_columns, self.rows.start - self.columns.start


def stripes(sequence: int, window: int) -> Iterator[Stripe]:
    """Yields stripes of all rows, each a quarter of a window.

    About a fifth of the computed scores are masked.
    """
    # Longer stripes mask more scores, shorter ones read more keys twice.
    rows = max(_ROWS, window // 4 // _ALIGNED * _ALIGNED)
    for first in range(0, sequence, rows):
        end = min(first + rows, sequence)
        first_column = max(0, first - window + 1) // _ALIGNED * _ALIGNED
        yield Stripe(slice(first, end), slice(first_column, end))


def windowed_attention(
    q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, window: int, *, in_fp32: bool
) -> Tensor:
    """Returns softmax(q k^T / sqrt(D)) v, [B, N, S, D].

    A query attends to `window` keys, the last of which is its own. With `in_fp32`, bf16
    is multiplied in fp32.
    """
    return _Windowed.apply(q_BNSD, k_BGSD, v_BGSD, window, in_fp32)


def masked_attention(q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, window: int) -> Tensor:
    """Returns the same by torch's attention, which has fast masked kernels on CUDA."""
    # No fast kernel supports both a mask and shared heads.
    k = fused.for_each_query_head(k_BGSD, q_BNSD)
    v = fused.for_each_query_head(v_BGSD, q_BNSD)
    attended = []
    for stripe in stripes(q_BNSD.shape[2], window):
        output = nn.functional.scaled_dot_product_attention(
            q_BNSD[:, :, stripe.rows],
            k[:, :, stripe.columns],
            v[:, :, stripe.columns],
            attn_mask=band(*stripe.shape, window, q_BNSD.device),
        )
        attended.append(output)
    return torch.cat(attended, 2)


class _Windowed(AutogradFunction[Tensor]):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int, in_fp32: bool
    ) -> Tensor:
        # In the kernels' output type, so that results are rounded once at the end.
        wide = torch.promote_types(q.dtype, torch.float32)
        output = torch.empty_like(q, dtype=wide)
        lse = torch.empty(q.shape[:3], dtype=wide, device=q.device)
        for stripe in stripes(q.shape[2], window):
            rows = stripe.rows
            columns = stripe.columns
            output[:, :, rows], lse[:, :, rows] = fused.forward(
                q[:, :, rows],
                k[:, :, columns],
                v[:, :, columns],
                causal=False,
                bias=band_bias(*stripe.shape, window, q),
                in_fp32=in_fp32,
            )
        attended = fused.tokens_first(output, q.dtype)
        ctx.save_for_backward(q, k, v, attended, lse)
        ctx.window = window
        ctx.in_fp32 = in_fp32
        return attended

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, lse = ctx.saved_tensors
        grad_q = torch.empty_like(q)
        # fp32, because stripes share keys and roundings to bf16 would accumulate.
        grad_k = torch.zeros_like(k, dtype=lse.dtype)
        grad_v = torch.zeros_like(v, dtype=lse.dtype)
        for stripe in stripes(q.shape[2], ctx.window):
            rows = stripe.rows
            columns = stripe.columns
            grads = fused.backward(
                grad[:, :, rows],
                q[:, :, rows],
                k[:, :, columns],
                v[:, :, columns],
                (output[:, :, rows], lse[:, :, rows]),
                causal=False,
                bias=band_bias(*stripe.shape, ctx.window, q),
                in_fp32=ctx.in_fp32,
            )
            grad_q[:, :, rows] = grads[0]
            grad_k[:, :, columns] += grads[1]
            grad_v[:, :, columns] += grads[2]
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None
