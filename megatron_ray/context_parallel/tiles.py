"""Computes attention by tiles: some queries against some keys, merged by softmax sums.

Owns: the arithmetic of tiles, of merging them, and of their gradients. Must not know:
groups, the tokens of each rank.

A tile's output is exact within the tile. Two tiles of the same queries are merged by
their log-sum-exp into the result of one softmax over both (online softmax: Milakov and
Gimelshein 2018; FlashAttention, Dao et al. 2022). In the backward pass a tile's
probabilities are exp(scores - final log-sum-exp), so tiles are independent.

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
    """A range of local queries that attends to a range of the current keys."""

    queries: slice
    keys: slice
    causal: bool = False
    """Whether the tile is a square on the diagonal, where later keys are masked."""
    band: tuple[int, int] | None = None
    """Set when a window ends inside the tile: the distance in tokens from the first key
    to the first query, and the window. Replaces `causal`, since it masks later keys
    too."""


def chunks_of(whole: Tensor, cut: SequenceCut, dim: int) -> Tensor:
    """Returns a rank's two chunks of whole sequences along `dim`."""
    chunks = whole.chunk(2 * cut.cp, dim=dim)
    return torch.cat([chunks[number] for number in cut.chunks], dim=dim)


@dataclass(frozen=True)
class Documents:
    """Document numbers of the queries [B, Q] and keys [B, K] of a list of tiles.

    Queries do not attend to keys of other documents.
    """

    of_queries: Tensor
    of_keys: Tensor

    def bias(self, tile: Tile, dtype: torch.dtype) -> Tensor:
        """Returns [B, 1, Q, K]: 0 where a query attends to a key, -inf elsewhere.

        The causal mask is included.
        """
        query_documents = self.of_queries[:, None, tile.queries, None]
        key_documents = self.of_keys[:, None, None, tile.keys]
        is_seen = query_documents == key_documents
        # A document is contiguous, so order within it is order in the sequence.
        queries, keys = is_seen.shape[-2:]
        device = is_seen.device
        if tile.band is not None:
            is_seen = is_seen & band(queries, keys, *tile.band, device)
        elif tile.causal:
            square = torch.ones((queries, keys), dtype=torch.bool, device=device)
            is_seen = is_seen & square.tril()
        bias = torch.zeros(is_seen.shape, dtype=dtype, device=device)
        return bias.masked_fill_(~is_seen, -torch.inf)


def _bias(
    tile: Tile, documents: Documents | None, q_BNQD: Tensor, k_BGKD: Tensor
) -> Tensor | None:
    """Returns the bias that is added to the scores of a tile, [B or 1, 1, Q, K].

    None where the kernel's own causal mask suffices.
    """
    if documents is not None:
        return documents.bias(tile, q_BNQD.dtype)
    if tile.band is not None:
        return band_bias(q_BNQD.shape[2], k_BGKD.shape[2], *tile.band, q_BNQD)
    return None


@dataclass
class PartialAttention:
    """The attention of queries over the keys processed so far.

    Output [B, N, Q, D] and log-sum-exp of the scores [B, N, Q], fp32 or wider.
    """

    output: Tensor
    lse: Tensor
    in_fp32: bool
    """Whether bf16 is multiplied in fp32."""

    @classmethod
    def empty(cls, q_BNQD: Tensor, *, in_fp32: bool) -> "PartialAttention":
        """Returns the attention over no keys at all."""
        dtype = torch.promote_types(q_BNQD.dtype, torch.float32)
        output = torch.zeros_like(q_BNQD, dtype=dtype)
        lse = q_BNQD.new_full(q_BNQD.shape[:-1], -torch.inf, dtype=dtype)
        return cls(output, lse, in_fp32)

    def merge(self, rows: slice, output: Tensor, lse: Tensor) -> None:
        """Merges in the attention of the queries in `rows` to further keys."""
        old_lse = self.lse[:, :, rows]
        # Each output is weighted by its share of the sum of exponentials.
        merged_lse = torch.logaddexp(old_lse, lse)
        # Without any key both are -inf and their difference is NaN; the weight is 0 then.
        old_weight = (old_lse - merged_lse).nan_to_num_(nan=-torch.inf).exp_()
        new_weight = (lse - merged_lse).nan_to_num_(nan=-torch.inf).exp_()
        old_output = self.output[:, :, rows]
        self.output[:, :, rows] = (
            old_output * old_weight[..., None] + output * new_weight[..., None]
        )
        self.lse[:, :, rows] = merged_lse


def attend(
    partial: PartialAttention,
    q_BNQD: Tensor,
    k_BGKD: Tensor,
    v_BGKD: Tensor,
    tiles: Sequence[Tile],
    documents: Documents | None,
) -> None:
    """Merges the attention to the keys of these tiles into `partial`."""
    for tile in tiles:
        q = q_BNQD[:, :, tile.queries]
        k = k_BGKD[:, :, tile.keys]
        v = v_BGKD[:, :, tile.keys]
        bias = _bias(tile, documents, q, k)
        output, lse = fused.forward(q, k, v, tile.causal, bias, in_fp32=partial.in_fp32)
        if bias is not None:
            # The kernel returns 0 for queries without a key; their sum is empty.
            lse = lse.masked_fill((bias == -torch.inf).all(-1), -torch.inf)
        partial.merge(tile.queries, output, lse)


@dataclass
class TileGradients:
    """Accumulates gradients over tiles, fp32 or wider."""

    queries: Tensor
    """Gradient of all queries of this rank, [B, N, Q, D]."""
    keys_values: Tensor
    """Gradient of the keys and values of the current block, [2, B, G, K, D]."""
    in_fp32: bool
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
    """Adds the gradients of these tiles to `gradients`.

    `final` is the output over all tiles, in the type of q, and its log-sum-exp.
    """
    # With the final log-sum-exp a tile's probabilities are those of the whole softmax.
    output, lse = final
    for tile in tiles:
        rows = tile.queries
        q = q_BNQD[:, :, rows]
        k = k_BGKD[:, :, tile.keys]
        v = v_BGKD[:, :, tile.keys]
        grad_q, grad_k, grad_v = fused.backward(
            grad_BNQD[:, :, rows],
            q,
            k,
            v,
            (output[:, :, rows], lse[:, :, rows]),
            tile.causal,
            _bias(tile, documents, q, k),
            in_fp32=gradients.in_fp32,
        )
        # Tiles of a list may overlap in queries and in keys.
        gradients.queries[:, :, rows] += grad_q
        gradients.keys_values[0, :, :, tile.keys] += grad_k
        gradients.keys_values[1, :, :, tile.keys] += grad_v
