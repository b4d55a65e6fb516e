"""Computes attention over gathered keys and values, as Llama 3 does.

Owns: the gather, and the keys that a rank's queries attend to. Must not know: heads,
layers.

One gather, after which everything is local. Simpler than the ring, with fewer and
larger messages, but each rank holds the keys and values of whole sequences during a
layer.

Shapes: as in ring; L = cp x S tokens of a whole sequence.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_ray.context_parallel.attention import ContextParallelAttention
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
from megatron_ray.ops.attention.fused import tokens_first
from megatron_ray.ops.autograd import AutogradFunction
from megatron_ray.sharding.sequence_split import SequenceCut


def gather_tiles(cut: SequenceCut, length: int, window: int | None) -> list[Tile]:
    """Returns the tiles of a rank's `length` queries and all keys in natural order.

    Each of its two chunks attends to all chunks before it and to a triangle of itself;
    with a window, to the part of both within the window.
    """
    chunk = length // 2
    tiles = []
    for index, number in enumerate(cut.chunks):
        rows = slice(index * chunk, (index + 1) * chunk)
        start = number * chunk
        end = start + chunk
        if window is not None:
            first = max(0, start - window + 1)
            tiles.append(Tile(rows, slice(first, end), band=(start - first, window)))
            continue
        # Two tiles, because the kernels apply the causal mask to squares only.
        if number:
            tiles.append(Tile(rows, slice(0, start)))
        tiles.append(Tile(rows, slice(start, end), causal=True))
    return tiles


def merge_chunks(parts: Tensor, dim: int) -> Tensor:
    """Returns whole sequences, in natural order, of the parts of all ranks [cp, ...].

    A part is two chunks along `dim`, one early and one late; the sequences lie along
    dim - 1 of the result.
    """
    early, late = parts.chunk(2, dim=dim)
    # Late chunks are in descending order of ranks, see `SequenceCut`.
    return torch.cat([*early.unbind(0), *late.flip(0).unbind(0)], dim=dim - 1)


def split_by_rank(whole: Tensor, cp: int, dim: int) -> Tensor:
    """Returns the parts of all ranks, [cp, ...] and contiguous; undoes `merge_chunks`."""
    parts = []
    for rank in range(cp):
        parts.append(chunks_of(whole, SequenceCut(cp, rank), dim - 1))
    return torch.stack(parts)


def _documents(cut: SequenceCut, documents: Tensor | None) -> Documents | None:
    if documents is None:
        return None
    return Documents(chunks_of(documents, cut, dim=1), documents)


class _Gather(AutogradFunction[Tensor]):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: Tensor | None,
        group: Group,
        window: int | None,
        in_fp32: bool,
    ) -> Tensor:
        cut = SequenceCut(collectives.size(group), collectives.rank(group))
        partial = PartialAttention.empty(q, in_fp32=in_fp32)
        own = torch.stack([k, v])
        keys, values = _gathered(own, group)
        tiles = gather_tiles(cut, q.shape[2], window)
        attend(partial, q, keys, values, tiles, _documents(cut, documents))
        output = tokens_first(partial.output, q.dtype)
        # Only this rank's part is saved; the backward gathers again.
        ctx.save_for_backward(q, own, output, partial.lse)
        ctx.cut = cut
        ctx.group = group
        ctx.documents = documents
        ctx.window = window
        ctx.in_fp32 = in_fp32
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, own, output, lse = ctx.saved_tensors
        cut: SequenceCut = ctx.cut
        whole = _gathered(own, ctx.group)
        # Keys of later chunks are in no tile, so their gradient stays zero.
        gradients = TileGradients(
            torch.zeros_like(q, dtype=lse.dtype),
            torch.zeros_like(whole, dtype=lse.dtype),
            in_fp32=ctx.in_fp32,
        )
        attend_backward(
            gradients,
            grad,
            q,
            whole[0],
            whole[1],
            (output, lse),
            gather_tiles(cut, q.shape[2], ctx.window),
            _documents(cut, ctx.documents),
        )
        # Every rank has gradients for all keys; each receives the sum for its own keys.
        parts = split_by_rank(gradients.keys_values, cut.cp, dim=4)
        summed = collectives.reduce_scatter_rows(parts, ctx.group).squeeze(0)
        grad_k, grad_v = summed.to(q.dtype).unbind(0)
        return gradients.queries.to(q.dtype), grad_k, grad_v, None, None, None, None


def _gathered(own_2BGSD: Tensor, group: Group) -> Tensor:
    """Returns keys and values of whole sequences, [2, B, G, L, D] in natural order."""
    parts = collectives.all_gather_rows(own_2BGSD[None], group)
    return merge_chunks(parts, dim=4)


class AllGatherAttention(ContextParallelAttention):
    """Gathers keys and values; each rank holds those of whole sequences for a while."""

    kernel = _Gather
