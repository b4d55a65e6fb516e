"""Attention over gathered keys and values.

Owns: that form of context parallelism (Llama 3's): one gather, then everything is
local.

Simpler than the ring and with fewer, larger messages, but each rank holds the keys and
values of whole sequences for the length of one layer. Must not know: heads exchanged,
layers. Shapes: as in ring; L = cp x S tokens of a whole sequence.
"""

from typing import Any

import torch
from torch import Tensor, nn

from megatron_ray.context_parallel.tiles import (
    Documents,
    PartialAttention,
    Tile,
    TileGradients,
    attend,
    attend_backward,
    chunks_of,
)
from megatron_ray.distributed import collectives
from megatron_ray.distributed.collectives import Group
from megatron_ray.distributed.device_kind import DeviceKind
from megatron_ray.models.batch import Packed
from megatron_ray.ops.attention.fused import tokens_first
from megatron_ray.sharding.sequence_split import SequenceCut


class AllGatherAttention(nn.Module):
    """(q [B, N, S, D], k and v [B, G, S, D]) -> causal attention [B, N, S, D] over the
    sequences of the whole group.
    """

    def __init__(self, group: Group, device: DeviceKind, window: int | None = None) -> None:
        """`device`: what it runs on; `window`: tokens that a token sees, itself
        included; None for all.
        """
        super().__init__()
        self.device = device
        self.group = group
        self.window = window

    def forward(
        self, q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, packed: Packed | None
    ) -> Tensor:
        documents = packed.documents_BS if packed is not None else None
        wide = self.device.widens(q_BNSD.dtype == torch.bfloat16)
        return _Gather.apply(  # type: ignore[no-any-return, no-untyped-call]
            q_BNSD, k_BGSD, v_BGSD, documents, self.group, self.window, wide
        )


def gather_tiles(cut: SequenceCut, length: int, window: int | None) -> list[Tile]:
    """What a rank's `length` queries see of keys in natural order: all chunks before
    each of its two, and their own by a triangle; with a window, what of both is within
    it.
    """
    chunk = length // 2
    tiles = []
    for place, number in enumerate(cut.chunks):
        rows = slice(place * chunk, (place + 1) * chunk)
        if window is not None:
            first = max(0, number * chunk - window + 1)
            tiles.append(
                Tile(
                    rows,
                    slice(first, (number + 1) * chunk),
                    band=(number * chunk - first, window),
                )
            )
            continue
        if number:
            tiles.append(Tile(rows, slice(0, number * chunk)))
        tiles.append(Tile(rows, slice(number * chunk, (number + 1) * chunk), causal=True))
    return tiles


def in_order(parts: Tensor, dim: int) -> Tensor:
    """[cp, ...] the parts of all ranks, each two chunks along `dim` -> whole sequences
    along dim - 1 of the result, in natural order.
    """
    early, late = parts.chunk(2, dim=dim)
    return torch.cat([*early.unbind(0), *late.flip(0).unbind(0)], dim=dim - 1)


def by_rank(whole: Tensor, cp: int, dim: int) -> Tensor:
    """Inverse of `in_order`: [cp, ...], contiguous."""
    return torch.stack(
        [chunks_of(whole, SequenceCut(cp, rank), dim - 1) for rank in range(cp)]
    )


def _documents(cut: SequenceCut, documents: Tensor | None) -> Documents | None:
    return (
        Documents(chunks_of(documents, cut, dim=1), documents)
        if documents is not None
        else None
    )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: Tensor | None,
        group: Group,
        window: int | None,
        wide: bool,
    ) -> Tensor:
        cut = SequenceCut(collectives.size(group), collectives.rank(group))
        so_far = PartialAttention.nothing(q, wide)
        own = torch.stack([k, v])
        keys, values = _gathered(own, cut.cp, group)
        attend(
            so_far,
            q,
            keys,
            values,
            gather_tiles(cut, q.shape[2], window),
            _documents(cut, documents),
        )
        output = tokens_first(so_far.output, q.dtype)
        ctx.save_for_backward(q, own, output, so_far.lse)
        ctx.wide = wide
        ctx.cut = cut
        ctx.group = group
        ctx.documents = documents
        ctx.window = window
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, own, output, lse = ctx.saved_tensors
        cut: SequenceCut = ctx.cut
        whole = _gathered(own, cut.cp, ctx.group)
        grad_q = torch.zeros_like(q, dtype=lse.dtype)
        gradients = TileGradients(
            grad_q, torch.zeros_like(whole, dtype=lse.dtype), ctx.wide
        )
        tiles = gather_tiles(cut, q.shape[2], ctx.window)
        attend_backward(
            gradients,
            grad,
            q,
            whole[0],
            whole[1],
            (output, lse),
            tiles,
            _documents(cut, ctx.documents),
        )
        parts = by_rank(gradients.keys_values, cut.cp, dim=4)
        grad_k, grad_v = (
            collectives.reduce_scatter_rows(parts, ctx.group)
            .squeeze(0)
            .to(q.dtype)
            .unbind(0)
        )
        return gradients.queries.to(q.dtype), grad_k, grad_v, None, None, None, None


def _gathered(own_2BGSD: Tensor, cp: int, group: Group) -> Tensor:
    """[2, B, G, L, D] in natural order."""
    parts = collectives.all_gather_rows(own_2BGSD[None], group)
    return in_order(parts, dim=4)
