"""Moving tokens to where their experts are and back, with gradients.

Owns: the differentiable moves, one class each.

Every sum over ranks is a sum. Must not know: layers, who holds which expert.

Shapes: T tokens, K experts of a token, H hidden, R rows (a token once for each of its
experts that are here).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_ray.distributed import collectives
from megatron_ray.distributed.collectives import Group
from megatron_ray.ops.dtypes import to_fp32


def take_tokens(x_TH: Tensor, slots_R: Tensor, top_k: int) -> Tensor:
    """Row r is token slots_R[r] // top_k, zero where slots_R[r] is T x top_k: [R, H]."""
    return _Take.apply(x_TH, slots_R, top_k)  # type: ignore[no-any-return, no-untyped-call]


def weigh_and_sum(rows_RH: Tensor, weights_TK: Tensor, slots_R: Tensor) -> Tensor:
    """Each token's rows times their weights, added up in fp32: [T, H].

    Where a token has no row for one of its K there is nothing to add.
    """
    return _WeighAndSum.apply(rows_RH, weights_TK, slots_R)  # type: ignore[no-any-return, no-untyped-call]


def reorder(rows_RH: Tensor, order_R: Tensor) -> Tensor:
    """rows[order], of a permutation."""
    return _Reorder.apply(rows_RH, order_R)  # type: ignore[no-any-return, no-untyped-call]


def exchange(
    rows: Tensor, send: Sequence[int] | None, receive: Sequence[int] | None, group: Group
) -> Tensor:
    """All-to-all; the gradient goes back the way the rows came."""
    return rows if group is None else _Exchange.apply(rows, send, receive, group)  # type: ignore[no-untyped-call]


def gather(rows: Tensor, counts: Sequence[int], group: Group) -> Tensor:
    """All-gather of counts[r] rows from rank r; the gradient is summed and scattered."""
    return rows if group is None else _Gather.apply(rows, counts, group)  # type: ignore[no-untyped-call]


def sum_and_scatter(rows: Tensor, counts: Sequence[int], group: Group) -> Tensor:
    """Reduce-scatter of counts[r] rows to rank r; the gradient is gathered."""
    return rows if group is None else _SumAndScatter.apply(rows, counts, group)  # type: ignore[no-untyped-call]


def _spread(rows: Tensor, slots_R: Tensor, num_slots: int) -> Tensor:
    """Each row at its slot, zeros elsewhere: [slots, ...].

    Rows that are only padding all go to one more slot, which is cut off.
    """
    spread = rows.new_zeros((num_slots + 1, *rows.shape[1:]))
    return spread.index_copy_(0, slots_R, rows)[:num_slots]


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.shape = x.shape[0], top_k
        tokens = torch.div(slots, top_k, rounding_mode="floor")
        rows = x.index_select(0, tokens.clamp(max=x.shape[0] - 1))
        return rows.masked_fill_((tokens == x.shape[0])[:, None], 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slots,) = ctx.saved_tensors
        tokens, top_k = ctx.shape
        return (
            _spread(grad, slots, tokens * top_k).view(tokens, top_k, -1).sum(1),
            None,
            None,
        )


class _WeighAndSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, slots)
        spread = _spread(rows, slots, weights.numel()).view(*weights.shape, -1)
        total = to_fp32(spread[:, 0]) * weights[:, :1]
        for k in range(1, weights.shape[1]):
            total.addcmul_(to_fp32(spread[:, k]), weights[:, k : k + 1])
        return total.to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights, slots = ctx.saved_tensors
        tokens = torch.div(slots, weights.shape[1], rounding_mode="floor").clamp_(
            max=weights.shape[0] - 1
        )
        of_row = weights.flatten()[slots.clamp(max=weights.numel() - 1)].masked_fill_(
            slots == weights.numel(), 0
        )
        grads = to_fp32(grad.index_select(0, tokens))
        grad_of_row = torch.linalg.vecdot(grads, to_fp32(rows))
        grad_weights = _spread(grad_of_row, slots, weights.numel()).view(weights.shape)
        return grads.mul_(of_row[:, None]).to(rows.dtype), grad_weights, None


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (order,) = ctx.saved_tensors
        return torch.empty_like(grad).index_copy_(0, order, grad), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        send: Sequence[int] | None,
        receive: Sequence[int] | None,
        group: Group,
    ) -> Tensor:
        ctx.way = send, receive, group
        return collectives.all_to_all_rows(rows, group, send, receive)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        send, receive, group = ctx.way
        return collectives.all_to_all_rows(grad, group, receive, send), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: Sequence[int], group: Group) -> Tensor:
        ctx.way = counts, group
        return collectives.all_gather_uneven_rows(rows, counts, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (
            collectives.reduce_scatter_uneven_rows(grad.contiguous(), *ctx.way),
            None,
            None,
        )


class _SumAndScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: Sequence[int], group: Group) -> Tensor:
        ctx.way = counts, group
        return collectives.reduce_scatter_uneven_rows(rows, counts, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return collectives.all_gather_uneven_rows(grad.contiguous(), *ctx.way), None, None
