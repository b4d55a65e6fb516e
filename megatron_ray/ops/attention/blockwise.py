"""Causal attention by blocks of query rows, from batched products in bf16.

Owns: its forward and backward.

torch's fused attention on CPU multiplies bf16 no faster than fp32 in its backward;
batched products do, so this is twice as quick there. On CUDA the fused kernels are the
right ones. Keeps only q, k and v for the backward and works on a block of scores at a
time, so memory grows with the sequence and not with its square. Must not know:
positions, caches, ranks.

Shapes: B batch, S sequence, N query heads, G key/value heads, D head width; P = B x G
pairs of a sequence and a key/value head, R the query rows of a block that meet one such
pair (N/G heads of a few rows each), C the columns (keys) they see.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ray.ops.attention.fused import tokens_first

# Query rows per block: the masked half of a diagonal block is wasted work, narrow
# products are slow ones.
_ROWS = 128
# Scores (fp32) worked on at a time: a few heads together keep products quick, more than
# the second-level cache holds does not.
_SCORES = 512 * 1024
# Scores of one key/value head at most: bounds memory when its queries or the sequence
# are many.
_LARGEST = 2 * 1024 * 1024


def _rows(per_pair: int, sequence: int) -> int:
    return max(16, min(_ROWS, sequence, _LARGEST // (per_pair * sequence)))


def causal_attention(q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v where a query sees the keys up to its own: [B, N, S,
    D], in memory [B, S, N, D].
    """
    return _CausalAttention.apply(q_BNSD, k_BGSD, v_BGSD)  # type: ignore[no-any-return, no-untyped-call]


@dataclass(frozen=True)
class _Block:
    """Some (sequence, head) pairs and some query rows, which see `columns` keys, the
    last `rows` of them by a triangle.
    """

    pairs: slice
    first: int
    columns: int

    @property
    def rows(self) -> slice:
        return slice(self.first, self.columns)


def _blocks(pairs: int, per_pair: int, sequence: int) -> list[_Block]:
    rows = _rows(per_pair, sequence)
    together = max(1, _SCORES // (per_pair * rows * sequence))
    return [
        _Block(slice(low, min(low + together, pairs)), first, min(first + rows, sequence))
        for low in range(0, pairs, together)
        for first in range(0, sequence, rows)
    ]


def _by_pair(heads_BNSD: Tensor, groups: int) -> Tensor:
    """[P, N/G, S, D]; a copy only where the heads' rows do not lie together."""
    batch, heads, sequence, width = heads_BNSD.shape
    return heads_BNSD.reshape(batch * groups, heads // groups, sequence, width)


def _block_rows(by_pair: Tensor, block: _Block) -> Tensor:
    """[P, R, D] of a block."""
    return by_pair[block.pairs, :, block.rows].flatten(1, 2)


class _Buffer:
    """Memory used again for every block: fresh memory of this size costs the system
    more than the arithmetic on it.
    """

    def __init__(self, blocks: list[_Block], per_pair: int, like: Tensor) -> None:
        self.per_pair = per_pair
        largest = max(
            (block.pairs.stop - block.pairs.start)
            * (block.columns - block.first)
            * block.columns
            for block in blocks
        )
        self._wide = torch.empty(largest * per_pair, device=like.device)
        self._short = self._wide.new_empty(largest * per_pair, dtype=like.dtype)

    def product(
        self, left: Tensor, right: Tensor, scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Scale x left @ right, and room for it in fp32."""
        shape = (left.shape[0], left.shape[1], right.shape[2])
        size = shape[0] * shape[1] * shape[2]
        short = self._short[:size].view(shape)
        wide = self._wide[:size].view(shape)
        return torch.baddbmm(short, left, right, beta=0, alpha=scale, out=short), wide


def _probabilities(
    q_PRD: Tensor, k_PCD: Tensor, hide_future: Tensor, buffer: _Buffer
) -> tuple[Tensor, Tensor]:
    """Softmax of the masked scores [P, R, C], in fp32 and rounded, in the buffer.

    A product in bf16 rounds the scores, by more the larger they are, so it is done once
    more for what the rounding lost. Without, sharp attention (scores of ten and more)
    is three times as far off as with fp32 scores.
    """
    keys_first = k_PCD.transpose(1, 2)
    scale = q_PRD.shape[-1] ** -0.5
    short, scores = buffer.product(q_PRD, keys_first, scale)
    scores.copy_(short)
    scores.add_(torch.baddbmm(short, q_PRD, keys_first, beta=-1, alpha=scale, out=short))
    rows = q_PRD.shape[1] // buffer.per_pair
    triangle = scores.view(len(scores), buffer.per_pair, rows, -1)[..., -rows:]
    triangle.add_(hide_future[:rows, :rows])
    # Largest, difference, exponential, sum and quotient while a row is in cache; a row
    # may be written over its scores.
    torch.softmax(scores, -1, out=scores)
    return scores, short.copy_(scores)


def _hide_future(rows: int, device: torch.device) -> Tensor:
    """What is added to the scores of a diagonal block."""
    return torch.full((rows, rows), -torch.inf, device=device).triu_(1)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, sequence, width = q.shape
        groups = k.shape[1]
        per_pair = heads // groups
        queries = _by_pair(q, groups)
        keys = k.flatten(0, 1)
        values = v.flatten(0, 1)
        ctx.save_for_backward(queries, keys, values)
        ctx.batch = batch
        blocks = _blocks(len(keys), per_pair, sequence)
        buffer = _Buffer(blocks, per_pair, q)
        attended = torch.empty_like(queries)
        hide_future = _hide_future(_rows(per_pair, sequence), q.device)
        for block in blocks:
            k_PCD = keys[block.pairs, : block.columns]
            v_PCD = values[block.pairs, : block.columns]
            _, p_PRC = _probabilities(
                _block_rows(queries, block), k_PCD, hide_future, buffer
            )
            attended[block.pairs, :, block.rows] = torch.bmm(p_PRC, v_PCD).view(
                len(p_PRC), per_pair, -1, width
            )
        return tokens_first(attended.view(q.shape), q.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        queries, keys, values = ctx.saved_tensors
        pairs, per_pair, sequence, width = queries.shape
        blocks = _blocks(pairs, per_pair, sequence)
        hide_future = _hide_future(_rows(per_pair, sequence), grad.device)
        grads = _by_pair(grad, pairs // ctx.batch)
        scale = width**-0.5
        p_buffer = _Buffer(blocks, per_pair, queries)
        grad_buffer = _Buffer(blocks, per_pair, queries)
        grad_q = torch.empty_like(queries)
        # Every block of rows adds to the keys it sees; many roundings to bf16 would add
        # up.
        grad_k, grad_v = (torch.zeros(keys.shape, device=keys.device) for _ in range(2))
        for block in blocks:
            k_PCD = keys[block.pairs, : block.columns]
            v_PCD = values[block.pairs, : block.columns]
            q_PRD = _block_rows(queries, block)
            grad_PRD = _block_rows(grads, block)
            p_PRC, p_short = _probabilities(q_PRD, k_PCD, hide_future, p_buffer)
            short, grad_p = grad_buffer.product(grad_PRD, v_PCD.transpose(1, 2))
            grad_p.copy_(short)
            # p (grad_p - sum of p grad_p) while a row is in cache.
            torch._softmax_backward_data(
                grad_p, p_PRC, -1, torch.float32, grad_input=grad_p
            )
            grad_s = short.copy_(grad_p)
            by_rows = torch.bmm(grad_s, k_PCD).view(len(grad_s), per_pair, -1, width)
            torch.mul(by_rows, scale, out=grad_q[block.pairs, :, block.rows])
            grad_k[block.pairs, : block.columns].add_(
                torch.bmm(grad_s.transpose(1, 2), q_PRD), alpha=scale
            )
            grad_v[block.pairs, : block.columns].add_(
                torch.bmm(p_short.transpose(1, 2), grad_PRD)
            )
        by_head = (ctx.batch, -1, sequence, width)
        return (
            grad_q.view(by_head),
            grad_k.to(keys.dtype).view(by_head),
            grad_v.to(keys.dtype).view(by_head),
        )
