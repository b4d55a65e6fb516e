"""Attention by tiles: blocks of queries against blocks of keys, put together by their
softmax sums.

Owns: the arithmetic of a tile, of joining tiles, and of their gradients. Must not know:
groups, who holds which tokens.

A tile's output is exact within the tile; with its log-sum-exp two tiles of the same
queries join to what one softmax over both would have given (online softmax: Milakov and
Gimelshein 2018; FlashAttention, Dao et al. 2022). In the backward, a tile's
probabilities are exp(scores - final log-sum-exp), so each tile is done by itself.

Shapes: B batch, N query heads, G key/value heads, D head width, Q queries and K keys of
a tile.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ray.ops.attention import fused
from megatron_ray.ops.attention.fused import band, band_bias
from megatron_ray.sharding.sequence_split import SequenceCut


@dataclass(frozen=True)
class Tile:
    """Queries [start, end) of what is held against keys [start, end) of what is there;
    a causal tile is square, on the diagonal.
    """

    queries: slice
    keys: slice
    causal: bool = False
    band: tuple[int, int] | None = None
    """Where a window cuts through it: how many tokens the first query is behind the
    first key, and the window. Says who is seen, later tokens included."""


def chunks_of(whole: Tensor, cut: SequenceCut, dim: int) -> Tensor:
    """A rank's two chunks of whole sequences, which lie along `dim`."""
    chunks = whole.chunk(2 * cut.cp, dim=dim)
    return torch.cat([chunks[number] for number in cut.chunks], dim=dim)


@dataclass(frozen=True)
class Documents:
    """Document numbers of the queries [B, Q] and keys [B, K] of a list of tiles: who is
    of another document is not seen.
    """

    of_queries: Tensor
    of_keys: Tensor

    def bias(self, tile: Tile, dtype: torch.dtype) -> Tensor:
        """[B, 1, Q, K]: 0 where a key is seen, -inf elsewhere, the diagonal of a causal
        tile included.
        """
        seen = (
            self.of_queries[:, None, tile.queries, None]
            == self.of_keys[:, None, None, tile.keys]
        )
        if tile.band is not None:
            seen = seen & band(seen.shape[-2], seen.shape[-1], *tile.band, seen.device)
        elif tile.causal:
            seen = (
                seen
                & torch.ones(seen.shape[-2:], dtype=torch.bool, device=seen.device).tril()
            )
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
            ~seen, -torch.inf
        )


def _bias(
    tile: Tile, documents: Documents | None, q_BNQD: Tensor, k_BGKD: Tensor
) -> Tensor | None:
    """What is added to the scores of a tile [B or 1, 1, Q, K]; None where the kernel's
    own triangle says it all.
    """
    if documents is not None:
        return documents.bias(tile, q_BNQD.dtype)
    return (
        band_bias(q_BNQD.shape[2], k_BGKD.shape[2], *tile.band, q_BNQD)
        if tile.band is not None
        else None
    )


@dataclass
class PartialAttention:
    """What queries have got so far: output [B, N, Q, D] and log-sum-exp of their scores
    [B, N, Q], both fp32 or wider.
    """

    output: Tensor
    lse: Tensor
    wide: bool
    """Whether bf16 is multiplied in fp32."""

    @classmethod
    def nothing(cls, q_BNQD: Tensor, wide: bool) -> "PartialAttention":
        """No key seen yet."""
        dtype = torch.promote_types(q_BNQD.dtype, torch.float32)
        output = torch.zeros_like(q_BNQD, dtype=dtype)
        return cls(
            output, q_BNQD.new_full(q_BNQD.shape[:-1], -torch.inf, dtype=dtype), wide
        )

    def join(self, rows: slice, output: Tensor, lse: Tensor) -> None:
        """Adds keys that the queries in `rows` had not seen yet."""
        before = self.lse[:, :, rows]
        both = torch.logaddexp(before, lse)
        # Where nothing is seen on either side both are -inf, and their difference is no
        # number.
        old, new = (
            (part - both).nan_to_num_(nan=-torch.inf).exp_()[..., None]
            for part in (before, lse)
        )
        self.output[:, :, rows] = self.output[:, :, rows] * old + output * new
        self.lse[:, :, rows] = both


def attend(
    so_far: PartialAttention,
    q_BNQD: Tensor,
    k_BGKD: Tensor,
    v_BGKD: Tensor,
    tiles: Sequence[Tile],
    documents: Documents | None,
) -> None:
    """Lets the queries see the keys of these tiles."""
    for tile in tiles:
        q = q_BNQD[:, :, tile.queries]
        k, v = (x[:, :, tile.keys] for x in (k_BGKD, v_BGKD))
        bias = _bias(tile, documents, q, k)
        output, lse = fused.forward(q, k, v, tile.causal, bias, wide=so_far.wide)
        if bias is not None:  # the kernel says 0 for who sees nothing
            lse = lse.masked_fill((bias == -torch.inf).all(-1), -torch.inf)
        so_far.join(tile.queries, output, lse)


@dataclass
class TileGradients:
    """Gradients of all queries [B, N, Q, D] and of the keys and values at hand [2, B,
    G, K, D]; fp32 or wider, added to tile by tile.
    """

    queries: Tensor
    keys_values: Tensor
    wide: bool
    """Whether bf16 is multiplied in fp32."""


def attend_backward(
    gradients: TileGradients,
    grad_BNQD: Tensor,
    q_BNQD: Tensor,
    k_BGKD: Tensor,
    v_BGKD: Tensor,
    final: tuple[Tensor, Tensor],
    tiles: Sequence[Tile],
    documents: Documents | None,
) -> None:
    """Adds the gradients of these tiles; `final` is the output, in the type of q, and
    its log-sum-exp, over all tiles.
    """
    output, lse = final
    for tile in tiles:
        rows = tile.queries
        q = q_BNQD[:, :, rows]
        k, v = (x[:, :, tile.keys] for x in (k_BGKD, v_BGKD))
        bias = _bias(tile, documents, q, k)
        said = (output[:, :, rows], lse[:, :, rows])
        found = fused.backward(
            grad_BNQD[:, :, rows], q, k, v, said, tile.causal, bias, wide=gradients.wide
        )
        gradients.queries[:, :, rows] += found[0]
        for place, grad in enumerate(found[1:]):
            gradients.keys_values[place, :, :, tile.keys] += grad
