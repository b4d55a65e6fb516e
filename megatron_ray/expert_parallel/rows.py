"""Moves tokens to the ranks of their experts and back, with gradients.

Owns: the differentiable operations, one class each. Must not know: layers, the experts
of each rank.

Every reduction over ranks is a sum.

Shapes: T tokens, K experts of a token, H hidden, R rows (one per token and local
expert).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_ray.distributed import collectives
from megatron_ray.distributed.collectives import Group
from megatron_ray.distributed.interleaver import Interleaver
from megatron_ray.ops.autograd import AutogradFunction
from megatron_ray.ops.dtypes import to_fp32


def take_tokens(x_TH: Tensor, slots_R: Tensor, top_k: int) -> Tensor:
    """Returns [R, H]: row r is token slots_R[r] // top_k, zero for slot T x top_k."""
    return _Take.apply(x_TH, slots_R, top_k)


def weigh_and_sum(rows_RH: Tensor, weights_TK: Tensor, slots_R: Tensor) -> Tensor:
    """Returns the weighted sum of each token's rows, accumulated in fp32: [T, H].

    A token without a row for one of its K experts adds nothing for it.
    """
    return _WeighAndSum.apply(rows_RH, weights_TK, slots_R)


def reorder(rows_RH: Tensor, order_R: Tensor) -> Tensor:
    """Returns rows[order], where the order is a permutation."""
    return _Reorder.apply(rows_RH, order_R)


def exchange(
    rows: Tensor,
    send: Sequence[int],
    receive: Sequence[int],
    group: Group,
    interleaver: Interleaver,
) -> Tensor:
    """Sends send[r] rows to rank r (all-to-all); the backward sends gradients back.

    Meanwhile the interleaver may run another pass.
    """
    if group is None:
        return rows
    return _Exchange.apply(rows, send, receive, group, interleaver)


def gather(rows: Tensor, counts: Sequence[int], group: Group) -> Tensor:
    """Gathers counts[r] rows of each rank r; the gradient is summed and scattered."""
    if group is None:
        return rows
    return _Gather.apply(rows, counts, group)


def sum_and_scatter(rows: Tensor, counts: Sequence[int], group: Group) -> Tensor:
    """Sums rows and scatters counts[r] of them to rank r; the gradient is gathered."""
    if group is None:
        return rows
    return _SumAndScatter.apply(rows, counts, group)


def _scatter_to_slots(rows: Tensor, slots_R: Tensor, num_slots: int) -> Tensor:
    """Returns [slots, ...] with each row at its slot and zeros elsewhere.

    Padding rows are written to an extra slot, which is removed.
    """
    by_slot = rows.new_zeros((num_slots + 1, *rows.shape[1:]))
    return by_slot.index_copy_(0, slots_R, rows)[:num_slots]


class _Take(AutogradFunction[Tensor]):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.num_tokens = x.shape[0]
        ctx.top_k = top_k
        tokens = torch.div(slots, top_k, rounding_mode="floor")
        # Padding has the invalid token T: an arbitrary row is read, then zeroed.
        rows = x.index_select(0, tokens.clamp(max=x.shape[0] - 1))
        return rows.masked_fill_((tokens == x.shape[0])[:, None], 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slots,) = ctx.saved_tensors
        num_slots = ctx.num_tokens * ctx.top_k
        # A token's gradient is the sum over its K rows.
        by_slot = _scatter_to_slots(grad, slots, num_slots)
        return by_slot.view(ctx.num_tokens, ctx.top_k, -1).sum(1), None, None


class _WeighAndSum(AutogradFunction[Tensor]):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, slots)
        by_slot = _scatter_to_slots(rows, slots, weights.numel()).view(*weights.shape, -1)
        # K additions in fp32, one rounding.
        total = to_fp32(by_slot[:, 0]) * weights[:, :1]
        for k in range(1, weights.shape[1]):
            total.addcmul_(to_fp32(by_slot[:, k]), weights[:, k : k + 1])
        return total.to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights, slots = ctx.saved_tensors
        num_tokens, top_k = weights.shape
        num_slots = weights.numel()
        # Padding has the invalid slot T x K, with weight zero.
        tokens = torch.div(slots, top_k, rounding_mode="floor").clamp_(max=num_tokens - 1)
        row_weights = weights.flatten()[slots.clamp(max=num_slots - 1)]
        row_weights.masked_fill_(slots == num_slots, 0)
        grads = to_fp32(grad.index_select(0, tokens))
        # A weight's gradient is the product of its row with the token's gradient.
        grad_row_weights = torch.linalg.vecdot(grads, to_fp32(rows))
        grad_weights = _scatter_to_slots(grad_row_weights, slots, num_slots)
        grad_rows = grads.mul_(row_weights[:, None]).to(rows.dtype)
        return grad_rows, grad_weights.view(weights.shape), None


class _Reorder(AutogradFunction[Tensor]):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (order,) = ctx.saved_tensors
        # Each row is written exactly once, so no accumulation or zeroing is needed.
        return torch.empty_like(grad).index_copy_(0, order, grad), None


class _Exchange(AutogradFunction[Tensor]):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        send: Sequence[int],
        receive: Sequence[int],
        group: Group,
        interleaver: Interleaver,
    ) -> Tensor:
        ctx.send = send
        ctx.receive = receive
        ctx.group = group
        ctx.interleaver = interleaver
        return _all_to_all(rows, send, receive, group, interleaver)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        returned = _all_to_all(grad, ctx.receive, ctx.send, ctx.group, ctx.interleaver)
        return returned, None, None, None, None


def _all_to_all(
    rows: Tensor,
    send: Sequence[int],
    receive: Sequence[int],
    group: Group,
    interleaver: Interleaver,
) -> Tensor:
    received, pending = collectives.start_all_to_all_rows(rows, group, send, receive)
    interleaver.switch()
    pending.wait()
    return received


class _Gather(AutogradFunction[Tensor]):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: Sequence[int], group: Group) -> Tensor:
        ctx.counts = counts
        ctx.group = group
        return collectives.all_gather_uneven_rows(rows, counts, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        summed = collectives.reduce_scatter_uneven_rows(
            grad.contiguous(), ctx.counts, ctx.group
        )
        return summed, None, None


class _SumAndScatter(AutogradFunction[Tensor]):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: Sequence[int], group: Group) -> Tensor:
        ctx.counts = counts
        ctx.group = group
        return collectives.reduce_scatter_uneven_rows(rows, counts, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gathered = collectives.all_gather_uneven_rows(
            grad.contiguous(), ctx.counts, ctx.group
        )
        return gathered, None, None
