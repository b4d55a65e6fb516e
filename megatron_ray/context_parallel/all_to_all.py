"""Exchanges parts of all heads for whole sequences of some heads (Ulysses).

Owns: the exchange around an inner attention (DeepSpeed-Ulysses, Jacobs et al. 2023),
which then has longer sequences and fewer heads: whole sequences or, in a hierarchy, the
part of a rank of the outer ring. Must not know: the inner attention.

Shapes: B batch, N heads, D head width, S tokens before and L = S x group after the
exchange.
"""

from typing import Any

from torch import Tensor, nn

from megatron_ray.context_parallel.all_gather import merge_chunks, split_by_rank
from megatron_ray.distributed import collectives
from megatron_ray.distributed.collectives import Group
from megatron_ray.models.batch import Packed
from megatron_ray.ops.autograd import AutogradFunction


class UlyssesAttention(nn.Module):
    """(q [B, N, S, D], k and v [B, G, S, D]) -> [B, N, S, D], by `inner` over some heads.

    The group's ranks are neighbours in the zig-zag order, so their chunks together form
    two runs, one early and one late: the part of a rank of the outer ring, or the whole
    sequence without an outer ring.
    """

    def __init__(self, group: Group, inner: nn.Module) -> None:
        super().__init__()
        self.group = group
        self.inner = inner

    def forward(
        self, q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, packed: Packed | None
    ) -> Tensor:
        """Returns the attention outputs [B, N, S, D], within documents if `packed`."""
        q = _ToHeads.apply(q_BNSD, self.group)
        k = _ToHeads.apply(k_BGSD, self.group)
        v = _ToHeads.apply(v_BGSD, self.group)
        return _ToTokens.apply(self.inner(q, k, v, packed), self.group)


def _to_heads(x_BNSD: Tensor, group: Group) -> Tensor:
    """Returns some heads of the group's tokens, [B, N / group, L, D]."""
    batch, _, *rest = x_BNSD.shape
    # Heads are split over ranks; the all-to-all exchanges rows of dim 0.
    by_receiver = x_BNSD.reshape(batch, collectives.size(group), -1, *rest).transpose(0, 1)
    return merge_chunks(collectives.all_to_all_rows(by_receiver, group), dim=3)


def _to_tokens(x_BNLD: Tensor, group: Group) -> Tensor:
    """Returns all heads of this rank's tokens; undoes `_to_heads`."""
    # Tokens are split over ranks again.
    by_receiver = split_by_rank(x_BNLD, collectives.size(group), dim=3)
    by_sender = collectives.all_to_all_rows(by_receiver, group)
    return by_sender.transpose(0, 1).flatten(1, 2)


class _ToHeads(AutogradFunction[Tensor]):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _to_heads(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _to_tokens(grad, ctx.group), None


class _ToTokens(AutogradFunction[Tensor]):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _to_tokens(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _to_heads(grad, ctx.group), None
