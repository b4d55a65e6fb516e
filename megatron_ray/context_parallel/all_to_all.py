"""Whole sequences of some heads instead of parts of all heads (DeepSpeed-Ulysses,
Jacobs et al. 2023). Owns: the exchange around an inner attention, which then has longer
sequences and fewer heads: all of the sequence, or, in a hierarchy, the part of a ring's
rank.

Must not know: what the inner attention does. Shapes: B batch, N heads, D head width, S
tokens before and L = S x group after the exchange.
"""

from typing import Any

import torch
from torch import Tensor, nn

from megatron_ray.context_parallel.all_gather import by_rank, in_order
from megatron_ray.distributed import collectives
from megatron_ray.distributed.collectives import Group
from megatron_ray.models.batch import Packed


class UlyssesAttention(nn.Module):
    """(q [B, N, S, D], k and v [B, G, S, D]) -> [B, N, S, D], by `inner` over heads cut
    among the group.

    The group's ranks are neighbours in the zig-zag order, so their chunks put together
    are again two runs, one early and one late: what a rank of an outer ring has, and
    the whole sequence where there is none outside.
    """

    def __init__(self, group: Group, inner: nn.Module) -> None:
        super().__init__()
        self.group = group
        self.inner = inner

    def forward(
        self, q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, packed: Packed | None
    ) -> Tensor:
        q, k, v = (_ToHeads.apply(x, self.group) for x in (q_BNSD, k_BGSD, v_BGSD))  # type: ignore[no-untyped-call]
        return _ToTokens.apply(self.inner(q, k, v, packed), self.group)  # type: ignore[no-any-return, no-untyped-call]


def _to_heads(x_BNSD: Tensor, group: Group) -> Tensor:
    """Some heads of the group's tokens: [B, N / group, L, D]."""
    batch, _, *rest = x_BNSD.shape
    by_receiver = x_BNSD.reshape(batch, collectives.size(group), -1, *rest).transpose(0, 1)
    return in_order(collectives.all_to_all_rows(by_receiver, group), dim=3)


def _to_tokens(x_BNLD: Tensor, group: Group) -> Tensor:
    """Inverse: all heads of this rank's tokens."""
    by_sender = collectives.all_to_all_rows(
        by_rank(x_BNLD, collectives.size(group), dim=3), group
    )
    return by_sender.transpose(0, 1).flatten(1, 2)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _to_heads(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _to_tokens(grad, ctx.group), None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _to_tokens(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _to_heads(grad, ctx.group), None
