"""Ring attention: keys and values go round the context-parallel ranks, point to point
(Liu et al. 2023). Owns: that order of hops.

While a rank attends to one block of keys and values the next is on its way, so it never
holds more than two. In the backward each block goes round once more, its gradient one
hop behind it, so that it arrives home complete. Must not know: heads exchanged, layers.

Shapes: B batch, N query heads, G key/value heads, D head width, S this rank's tokens:
two chunks of every sequence (data.sequence_cut).
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


def ring_tiles(rank: int, owner: int, length: int) -> list[Tile]:
    """What a rank's `length` queries see of the keys of `owner`; as much work for every
    pair but a rank and itself.
    """
    half = length // 2
    everything = slice(0, length)
    if owner == rank:
        return [Tile(everything, everything, causal=True)]
    # its early chunk lies before both of ours, its late one after both
    if owner < rank:
        return [Tile(everything, slice(0, half))]
    return [Tile(slice(half, length), everything)]


def windowed_ring_tiles(
    cut: SequenceCut, owner: int, length: int, window: int
) -> list[Tile]:
    """As `ring_tiles`, chunk against chunk: those too far apart are left out, and a
    window that ends inside one is said.
    """
    chunk = length // 2
    tiles = []
    for place, number in enumerate(cut.chunks):
        for other_place, other in enumerate(SequenceCut(cut.cp, owner).chunks):
            behind = (number - other) * chunk
            nearest = max(0, behind - chunk + 1)
            farthest = behind + chunk - 1
            if behind < 0 or nearest >= window:
                continue
            rows, columns = (
                slice(which * chunk, (which + 1) * chunk) for which in (place, other_place)
            )
            tiles.append(
                Tile(
                    rows,
                    columns,
                    causal=behind == 0,
                    band=(behind, window) if farthest >= window else None,
                )
            )
    return tiles


class RingAttention(nn.Module):
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
        return _Ring.apply(q_BNSD, k_BGSD, v_BGSD, documents, self.group, self.window, wide)  # type: ignore[no-any-return, no-untyped-call]


class _Hops:
    """Which block is here at which hop, and moving it to the next rank."""

    def __init__(self, group: Group, documents: Tensor | None, window: int | None) -> None:
        self.group = group
        self.rank = collectives.rank(group)
        self.size = collectives.size(group)
        self._documents = documents
        self._window = window

    def owner(self, hop: int) -> int:
        return (self.rank - hop) % self.size

    def start(self, tensor: Tensor) -> tuple[Tensor, collectives.Pending]:
        """What the rank before sends is in the first item after `wait`; `tensor` must
        stay as it is until then.
        """
        arriving = torch.empty_like(tensor)
        after = (self.rank + 1) % self.size
        before = (self.rank - 1) % self.size
        return arriving, collectives.start_exchange(
            tensor, after, arriving, before, self.group
        )

    def tiles(self, owner: int, length: int) -> list[Tile]:
        """What this rank's queries see of an owner's keys."""
        if self._window is None:
            return ring_tiles(self.rank, owner, length)
        return windowed_ring_tiles(
            SequenceCut(self.size, self.rank), owner, length, self._window
        )

    def documents(self, owner: int) -> Documents | None:
        if self._documents is None:
            return None
        return Documents(
            *(
                chunks_of(self._documents, SequenceCut(self.size, rank), dim=1)
                for rank in (self.rank, owner)
            )
        )


class _Ring(torch.autograd.Function):
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
        hops = _Hops(group, documents, window)
        so_far = PartialAttention.nothing(q, wide)
        length = q.shape[2]
        own = torch.stack([k, v])
        block = own
        for hop in range(hops.size):
            if hop + 1 < hops.size:
                arriving, pending = hops.start(block)
            owner = hops.owner(hop)
            attend(
                so_far,
                q,
                block[0],
                block[1],
                hops.tiles(owner, length),
                hops.documents(owner),
            )
            if hop + 1 < hops.size:
                pending.wait()
                block = arriving
        output = tokens_first(so_far.output, q.dtype)
        ctx.save_for_backward(q, own, output, so_far.lse)
        ctx.hops = hops
        ctx.wide = wide
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, block, output, lse = ctx.saved_tensors
        hops: _Hops = ctx.hops
        grad_q = torch.zeros_like(q, dtype=lse.dtype)
        travelling: tuple[Tensor, collectives.Pending] | None = None
        for hop in range(hops.size):
            last = hop + 1 == hops.size
            if not last:
                next_block, pending = hops.start(block)
            owner = hops.owner(hop)
            gradients = TileGradients(
                grad_q, torch.zeros_like(block, dtype=lse.dtype), ctx.wide
            )
            tiles = hops.tiles(owner, q.shape[2])
            attend_backward(
                gradients,
                grad,
                q,
                block[0],
                block[1],
                (output, lse),
                tiles,
                hops.documents(owner),
            )
            if travelling is not None:
                travelling[1].wait()
                gradients.keys_values += travelling[0]
            if not last:
                pending.wait()
                block = next_block
            travelling = hops.start(gradients.keys_values)
        assert travelling is not None
        travelling[1].wait()
        grad_k, grad_v = travelling[0].to(q.dtype).unbind(0)
        return grad_q.to(q.dtype), grad_k, grad_v, None, None, None, None
