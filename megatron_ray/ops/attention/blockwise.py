"""Computes causal attention tile by tile, from batched products in bf16.

Owns: its forward and backward. Must not know: positions,
caches, ranks.

torch's fused attention on CPU gains nothing from bf16 in its backward; batched products
do, so this is twice as fast on CPU. On CUDA the fused kernels are faster. Saves only q,
k and v for the backward and computes one tile of scores at a time, so memory is linear
in the sequence.

Shapes: B batch, S sequence, N query heads, G key/value heads, D head width; P = B x G
pairs of a sequence and a key/value head, R the query rows of a tile for one such pair
(N/G heads of a few rows each), C the columns (keys) that they attend to.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ray.ops.attention.fused import tokens_first
from megatron_ray.ops.autograd import AutogradFunction

# Query rows per tile: large tiles waste work on the masked half of the diagonal, small
# tiles make products slow.
_ROWS = 128
# fp32 scores of a tile: a few heads at once keep products fast, but scores should fit into
# the second-level cache.
_SCORES = 512 * 1024
# Maximum number of scores of one key/value head: bounds memory for many queries or long
# sequences.
_LARGEST = 2 * 1024 * 1024


def _rows(per_pair: int, sequence: int) -> int:
    """Returns the query rows of a tile, where `per_pair` heads share keys."""
    return max(16, min(_ROWS, sequence, _LARGEST // (per_pair * sequence)))


def causal_attention(q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
    """Returns causal softmax(q k^T / sqrt(D)) v.

    The result is [B, N, S, D], in memory [B, S, N, D].
    """
    return _CausalAttention.apply(q_BNSD, k_BGSD, v_BGSD)


@dataclass(frozen=True)
class _Tile:
    """A range of pairs and of query rows, with all keys up to the last row."""

    pairs: slice
    first: int
    """The first query row."""
    columns: int
    """Keys that the rows attend to. The last ones, as many as rows, form the diagonal
    square, which is masked."""

    @property
    def rows(self) -> slice:
        return slice(self.first, self.columns)

    @property
    def num_scores(self) -> int:
        """Scores of one of the heads that share keys."""
        num_pairs: int = self.pairs.stop - self.pairs.start
        return num_pairs * (self.columns - self.first) * self.columns

    def rows_of(self, by_pair: Tensor) -> Tensor:
        """Returns the tile's rows [P, R, D] of [P, N/G, S, D]."""
        return by_pair[self.pairs, :, self.rows].flatten(1, 2)

    def columns_of(self, keys: Tensor) -> Tensor:
        """Returns a view of the tile's keys or values, [P, C, D]."""
        return keys[self.pairs, : self.columns]


def _tiles(queries: Tensor) -> list[_Tile]:
    """Returns the tiles of queries [P, N/G, S, D], in the order of pairs and rows."""
    pairs, per_pair, sequence, _ = queries.shape
    rows = _rows(per_pair, sequence)
    # As many heads at once as the cache allows.
    pairs_at_once = max(1, _SCORES // (per_pair * rows * sequence))
    tiles = []
    for low in range(0, pairs, pairs_at_once):
        high = min(low + pairs_at_once, pairs)
        for first in range(0, sequence, rows):
            tiles.append(_Tile(slice(low, high), first, min(first + rows, sequence)))
    return tiles


def _by_pair(heads_BNSD: Tensor, groups: int) -> Tensor:
    """Returns [P, N/G, S, D]; copies only if the heads' rows are not contiguous."""
    batch, heads, sequence, width = heads_BNSD.shape
    return heads_BNSD.reshape(batch * groups, heads // groups, sequence, width)


class _ScoreBuffer:
    """Memory for the scores of a tile, reused for every tile.

    Allocating it for each tile would cost more than the arithmetic.
    """

    def __init__(self, tiles: list[_Tile], queries: Tensor) -> None:
        self.per_pair = queries.shape[1]
        largest = max(tile.num_scores for tile in tiles) * self.per_pair
        self._wide = torch.empty(largest, device=queries.device)
        self._short = self._wide.new_empty(largest, dtype=queries.dtype)

    def product(
        self, left: Tensor, right: Tensor, scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Returns scale x left @ right, and memory for it in fp32."""
        shape = (left.shape[0], left.shape[1], right.shape[2])
        size = shape[0] * shape[1] * shape[2]
        short = self._short[:size].view(shape)
        wide = self._wide[:size].view(shape)
        return torch.baddbmm(short, left, right, beta=0, alpha=scale, out=short), wide


def _probabilities(
    q_PRD: Tensor, k_PCD: Tensor, hide_future: Tensor, buffer: _ScoreBuffer
) -> tuple[Tensor, Tensor]:
    """Returns the softmax of the masked scores [P, R, C], in fp32 and rounded.

    Both use the buffer. A product in bf16 rounds the scores, large ones the most, so a
    second product adds the rounding error. Otherwise the error of sharp attention
    (scores of ten and more) is three times that of fp32 scores.
    """
    keys_first = k_PCD.transpose(1, 2)
    scale = q_PRD.shape[-1] ** -0.5
    short, scores = buffer.product(q_PRD, keys_first, scale)
    scores.copy_(short)
    # scale x q k^T minus its own rounding, added in fp32.
    scores.add_(torch.baddbmm(short, q_PRD, keys_first, beta=-1, alpha=scale, out=short))
    rows = q_PRD.shape[1] // buffer.per_pair
    diagonal = scores.view(len(scores), buffer.per_pair, rows, -1)[..., -rows:]
    diagonal.add_(hide_future[:rows, :rows])
    # One kernel computes maximum, difference, exponential, sum and quotient while a row is
    # in cache; it may overwrite its input.
    torch.softmax(scores, -1, out=scores)
    return scores, short.copy_(scores)


def _hide_future(queries: Tensor) -> Tensor:
    """Returns the causal bias of a diagonal square's scores, [rows, rows]."""
    rows = _rows(queries.shape[1], queries.shape[2])
    return torch.full((rows, rows), -torch.inf, device=queries.device).triu_(1)


@dataclass(frozen=True)
class _Gradients:
    """Gradients of queries [P, N/G, S, D], and of keys and values [P, S, D].

    Gradients of keys and values are fp32, because every tile adds to them and roundings
    to bf16 would accumulate.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor

    @classmethod
    def zeros(cls, queries: Tensor, keys: Tensor) -> "_Gradients":
        """Returns zero gradients."""
        return cls(
            torch.empty_like(queries),
            torch.zeros(keys.shape, device=keys.device),
            torch.zeros(keys.shape, device=keys.device),
        )

    def add_scores(self, tile: _Tile, grad_s: Tensor, q_PRD: Tensor, k_PCD: Tensor) -> None:
        """Adds the gradients of queries and keys from the gradient of a tile's scores."""
        _, per_pair, _, width = self.queries.shape
        scale = width**-0.5
        # A query's gradient is complete after its tile, a key's after all tiles.
        grad_q = torch.bmm(grad_s, k_PCD).view(len(grad_s), per_pair, -1, width)
        torch.mul(grad_q, scale, out=self.queries[tile.pairs, :, tile.rows])
        grad_k = torch.bmm(grad_s.transpose(1, 2), q_PRD)
        tile.columns_of(self.keys).add_(grad_k, alpha=scale)

    def add_values(self, tile: _Tile, p_PRC: Tensor, grad_PRD: Tensor) -> None:
        """Adds the gradient of values from a tile's probabilities and output gradient."""
        tile.columns_of(self.values).add_(torch.bmm(p_PRC.transpose(1, 2), grad_PRD))


class _CausalAttention(AutogradFunction[Tensor]):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries = _by_pair(q, k.shape[1])
        keys = k.flatten(0, 1)
        values = v.flatten(0, 1)
        ctx.save_for_backward(queries, keys, values)
        ctx.batch = q.shape[0]
        tiles = _tiles(queries)
        buffer = _ScoreBuffer(tiles, queries)
        hide_future = _hide_future(queries)
        attended = torch.empty_like(queries)
        for tile in tiles:
            _, p_PRC = _probabilities(
                tile.rows_of(queries), tile.columns_of(keys), hide_future, buffer
            )
            output = torch.bmm(p_PRC, tile.columns_of(values))
            by_head = (len(output), queries.shape[1], -1, queries.shape[3])
            attended[tile.pairs, :, tile.rows] = output.view(by_head)
        return tokens_first(attended.view(q.shape), q.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        queries, keys, values = ctx.saved_tensors
        grads = _by_pair(grad, len(keys) // ctx.batch)
        gradients = _backward(grads, queries, keys, values)
        by_head = (ctx.batch, -1, *queries.shape[2:])
        return (
            gradients.queries.view(by_head),
            gradients.keys.to(keys.dtype).view(by_head),
            gradients.values.to(keys.dtype).view(by_head),
        )


def _backward(grads: Tensor, queries: Tensor, keys: Tensor, values: Tensor) -> _Gradients:
    """Returns the gradients; the probabilities of each tile are recomputed."""
    tiles = _tiles(queries)
    hide_future = _hide_future(queries)
    p_buffer = _ScoreBuffer(tiles, queries)
    grad_buffer = _ScoreBuffer(tiles, queries)
    gradients = _Gradients.zeros(queries, keys)
    for tile in tiles:
        q_PRD = tile.rows_of(queries)
        k_PCD = tile.columns_of(keys)
        grad_PRD = tile.rows_of(grads)
        p_wide, p_PRC = _probabilities(q_PRD, k_PCD, hide_future, p_buffer)
        grad_s = _grad_of_scores(p_wide, grad_PRD, tile.columns_of(values), grad_buffer)
        gradients.add_scores(tile, grad_s, q_PRD, k_PCD)
        gradients.add_values(tile, p_PRC, grad_PRD)
    return gradients


def _grad_of_scores(
    p_PRC: Tensor, grad_PRD: Tensor, v_PCD: Tensor, buffer: _ScoreBuffer
) -> Tensor:
    """Returns the gradient of a tile's scores [P, R, C], in the buffer and rounded."""
    short, grad_p = buffer.product(grad_PRD, v_PCD.transpose(1, 2))
    grad_p.copy_(short)
    # One kernel computes p (grad_p - sum of p grad_p) while a row is in cache.
    torch._softmax_backward_data(grad_p, p_PRC, -1, torch.float32, grad_input=grad_p)
    return short.copy_(grad_p)
