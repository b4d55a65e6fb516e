"""Computes ring attention: ranks pass keys and values around (Liu et al. 2023).

Owns: the order of the hops. Must not know: heads, layers.

While a rank attends to one block of keys and values, the next one is in transfer, so it
never holds more than two. In the backward pass each block is passed around again with
its gradient one hop behind, so that the complete gradient arrives at the block's owner.

Shapes: B batch, N query heads, G key/value heads, D head width, S this rank's tokens:
two chunks of every sequence (sharding.sequence_split).
"""

from dataclasses import dataclass
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


def ring_tiles(rank: int, owner: int, length: int) -> list[Tile]:
    """Returns the tiles of the `length` queries of `rank` and the keys of `owner`.

    All pairs of different ranks have equal work.
    """
    half = length // 2
    everything = slice(0, length)
    if owner == rank:
        return [Tile(everything, everything, causal=True)]
    # Rank r has chunks r and 2 cp - 1 - r. The early chunk of a lower rank precedes both
    # chunks of `rank`, and its late chunk follows both; vice versa for a higher rank.
    if owner < rank:
        return [Tile(everything, slice(0, half))]
    return [Tile(slice(half, length), everything)]


def windowed_ring_tiles(
    cut: SequenceCut, owner: int, length: int, window: int
) -> list[Tile]:
    """Returns the tiles for attention within a window, chunk against chunk.

    Chunks too far apart are left out.
    """
    chunk = length // 2
    tiles = []
    for query_index, query_chunk in enumerate(cut.chunks):
        for key_index, key_chunk in enumerate(SequenceCut(cut.cp, owner).chunks):
            # Distance in tokens from a key to the query at the same index of its chunk.
            distance = (query_chunk - key_chunk) * chunk
            nearest = max(0, distance - chunk + 1)
            farthest = distance + chunk - 1
            if distance < 0 or nearest >= window:
                continue
            band = None
            if farthest >= window:
                band = (distance, window)
            rows = slice(query_index * chunk, (query_index + 1) * chunk)
            columns = slice(key_index * chunk, (key_index + 1) * chunk)
            tiles.append(Tile(rows, columns, causal=distance == 0, band=band))
    return tiles


@dataclass(frozen=True)
class _PendingReceive:
    """A tensor that is being received from the previous rank."""

    tensor: Tensor
    pending: collectives.Pending

    def wait(self) -> Tensor:
        """Returns the tensor once it has arrived."""
        self.pending.wait()
        return self.tensor


class _Hops:
    """Moves blocks to the next rank, and tracks the local block of each hop."""

    def __init__(self, group: Group, documents: Tensor | None, window: int | None) -> None:
        self.group = group
        self.rank = collectives.rank(group)
        self.size = collectives.size(group)
        self._documents = documents
        self._window = window

    def owner(self, hop: int) -> int:
        """Returns the owner of the keys and values that are local at a hop."""
        return (self.rank - hop) % self.size

    def start(self, tensor: Tensor) -> _PendingReceive:
        """Starts sending `tensor` to the next rank and receiving from the previous one.

        `tensor` must not change until the received tensor has been waited for.
        """
        incoming = torch.empty_like(tensor)
        next_rank = (self.rank + 1) % self.size
        previous_rank = (self.rank - 1) % self.size
        pending = collectives.start_exchange(
            tensor, next_rank, incoming, previous_rank, self.group
        )
        return _PendingReceive(incoming, pending)

    def tiles(self, owner: int, length: int) -> list[Tile]:
        """Returns the tiles of this rank's queries and an owner's keys."""
        if self._window is None:
            return ring_tiles(self.rank, owner, length)
        cut = SequenceCut(self.size, self.rank)
        return windowed_ring_tiles(cut, owner, length, self._window)

    def documents(self, owner: int) -> Documents | None:
        """Returns the documents of this rank's queries and an owner's keys."""
        if self._documents is None:
            return None
        return Documents(
            chunks_of(self._documents, SequenceCut(self.size, self.rank), dim=1),
            chunks_of(self._documents, SequenceCut(self.size, owner), dim=1),
        )


class _Ring(AutogradFunction[Tensor]):
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
        hops = _Hops(group, documents, window)
        partial = PartialAttention.empty(q, in_fp32=in_fp32)
        # Keys and values travel in one message.
        own = torch.stack([k, v])
        block = own
        for hop in range(hops.size):
            # The last block is not passed on: the next rank is its owner.
            next_block = None
            if hop + 1 < hops.size:
                next_block = hops.start(block)
            owner = hops.owner(hop)
            tiles = hops.tiles(owner, q.shape[2])
            # Computes while the next block arrives.
            attend(partial, q, block[0], block[1], tiles, hops.documents(owner))
            if next_block is not None:
                block = next_block.wait()
        output = tokens_first(partial.output, q.dtype)
        # Blocks of other ranks are not saved: the backward passes them around again.
        ctx.save_for_backward(q, own, output, partial.lse)
        ctx.hops = hops
        ctx.in_fp32 = in_fp32
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, block, output, lse = ctx.saved_tensors
        hops: _Hops = ctx.hops
        grad_q = torch.zeros_like(q, dtype=lse.dtype)
        # The gradient of the local block, as accumulated by the previous ranks.
        arriving_grad: _PendingReceive | None = None
        for hop in range(hops.size):
            next_block = None
            if hop + 1 < hops.size:
                next_block = hops.start(block)
            owner = hops.owner(hop)
            # This rank's part of the block's gradient, to which the received sum is added.
            gradients = TileGradients(
                grad_q, torch.zeros_like(block, dtype=lse.dtype), in_fp32=ctx.in_fp32
            )
            attend_backward(
                gradients,
                grad,
                q,
                block[0],
                block[1],
                (output, lse),
                hops.tiles(owner, q.shape[2]),
                hops.documents(owner),
            )
            if arriving_grad is not None:
                gradients.keys_values += arriving_grad.wait()
            if next_block is not None:
                block = next_block.wait()
            # One more hop than for the blocks returns each gradient to its owner.
            arriving_grad = hops.start(gradients.keys_values)
        assert arriving_grad is not None
        own_grad = arriving_grad.wait().to(q.dtype)
        return grad_q.to(q.dtype), own_grad[0], own_grad[1], None, None, None, None


class RingAttention(ContextParallelAttention):
    """Passes keys and values around; no rank holds those of whole sequences."""

    kernel = _Ring
