"""Causal self-attention with grouped key/value heads. Owns: the maths of one attention layer. Must not know: ranks, groups.

Shapes: T = B x S tokens, B batch, S sequence, N query heads, G key/value heads, D head width. How many heads are here is what the
projection says, so tensor parallelism shrinks them unseen.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_ray.config.model import ModelConfig
from megatron_ray.data.loader import Packed
from megatron_ray.matmul import multiplies_wide
from megatron_ray.models.attention_blocks import blocks_are_faster, causal_attention
from megatron_ray.models.attention_wide import wide_causal_attention
from megatron_ray.models.layers import Layers
from megatron_ray.models.rope import ROTATION, RotateQKV, split_qkv


@dataclass
class KeyValueCache:
    """Keys and values of the tokens so far, [B, G, S, D] with room for `capacity` tokens; one per layer."""

    keys: Tensor
    values: Tensor
    length: int = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores new [B, G, S, D] entries and returns everything so far. Raises ValueError when there is no room."""
        end = self.length + keys.shape[2]
        if end > self.keys.shape[2]:
            raise ValueError(f"the cache has room for {self.keys.shape[2]} tokens, {end} are needed")
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


@dataclass(frozen=True)
class Positions:
    """What a block needs to know of a batch besides its activations: its shape, with rotary positions the cos and sin [B or 1, S, 1, D],
    its documents, and what its routers are told or are to tell."""

    batch: int
    sequence: int
    cos: Tensor | None
    sin: Tensor | None
    packed: Packed | None = None
    expert_choices: Tensor | None = None
    """[T, layers, K]: the experts that routers are to take instead of choosing."""
    on_choice: Callable[[int, Tensor], None] | None = None
    """Hears of every router's choice: (layer, experts [tokens of this rank, K])."""
    first_sample: int | None = None
    """Of the batch, where dropout is to drop."""


class CausalAttention(nn.Module):
    """softmax(Q K^T / sqrt(D)) V, whoever makes queries, keys and values."""

    def __init__(self, layers: Layers, place: str) -> None:
        super().__init__()
        self.core = layers.attention()
        self.dropping_core = layers.dropping_attention(f"{place}.probabilities")

    def attended(self, q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, positions: Positions, cache: KeyValueCache | None) -> Tensor:
        """[B, N, S, D]"""
        if cache is not None:
            return self._attend_cached(q_BNSD, k_BGSD, v_BGSD, cache)
        return self._attend(q_BNSD, k_BGSD, v_BGSD, positions)

    def _attend(self, q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, positions: Positions) -> Tensor:
        if self.dropping_core is None or positions.first_sample is None:
            attended: Tensor = self.core(q_BNSD, k_BGSD, v_BGSD, positions.packed)
        else:
            attended = self.dropping_core(q_BNSD, k_BGSD, v_BGSD, (positions.packed, positions.first_sample))
        return attended

    def _attend_cached(self, q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, cache: KeyValueCache) -> Tensor:
        mask, seen = None, cache.length
        k_BGSD, v_BGSD = cache.append(k_BGSD, v_BGSD)
        if seen:
            # Rows of the mask are the new tokens, which see everything before them.
            new, total = q_BNSD.shape[2], k_BGSD.shape[2]
            mask = torch.ones(new, total, dtype=torch.bool, device=q_BNSD.device).tril(diagonal=seen)
        grouped = q_BNSD.shape[1] > k_BGSD.shape[1]
        return nn.functional.scaled_dot_product_attention(
            q_BNSD, k_BGSD, v_BGSD, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
        )


class Attention(CausalAttention):
    """x -> residual + O(softmax(Q K^T / sqrt(D)) V); without the residual where none is given."""

    def __init__(self, config: ModelConfig, layers: Layers, place: str) -> None:
        super().__init__(layers, place)
        self.head_width = config.head_width
        self.rotation = ROTATION
        heads, groups = config.num_attention_heads, config.kv_heads
        self.qkv = layers.qkv(config.hidden_size, heads, groups, self.head_width, config.linear_bias)
        self.o = layers.row(heads * self.head_width, config.hidden_size, config.linear_bias)

    def forward(self, x_TH: Tensor, residual_TH: Tensor | None, positions: Positions, cache: KeyValueCache | None = None) -> Tensor:
        qkv: Tensor = self.qkv(x_TH).view(positions.batch, positions.sequence, -1)
        heads, groups = self.qkv.heads, self.qkv.groups
        if positions.cos is not None:
            sizes = heads, groups, self.head_width
            q, k, v = RotateQKV.apply(qkv, positions.cos, positions.sin, sizes, self.rotation)  # type: ignore[no-untyped-call]
        else:
            q, k, v = split_qkv(qkv, heads, groups, self.head_width)
        attended = self.attended(q, k, v, positions, cache)
        merged = attended.transpose(1, 2).reshape(positions.batch * positions.sequence, heads * self.head_width)
        output: Tensor = self.o(merged, residual_TH)
        return output


class WholeAttention(nn.Module):
    """Causal attention of sequences that lie whole on this rank."""

    def forward(self, q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, packed: Packed | None) -> Tensor:
        if packed is None:
            return _whole(q_BNSD, k_BGSD, v_BGSD)
        rows = []
        for row, lengths in enumerate(packed.lengths):
            documents = zip(*(torch.split(x[row : row + 1], list(lengths), dim=2) for x in (q_BNSD, k_BGSD, v_BGSD)), strict=True)
            rows.append(torch.cat([_whole(*document) for document in documents], dim=2))
        return torch.cat(rows)


def _whole(q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
    """Every row is one sequence."""
    if multiplies_wide(q_BNSD.device.type, q_BNSD.dtype):
        return wide_causal_attention(q_BNSD, k_BGSD, v_BGSD)
    if blocks_are_faster(q_BNSD.device.type, q_BNSD.dtype, q_BNSD.shape[2]):
        return causal_attention(q_BNSD, k_BGSD, v_BGSD)
    grouped = q_BNSD.shape[1] != k_BGSD.shape[1]
    return nn.functional.scaled_dot_product_attention(q_BNSD, k_BGSD, v_BGSD, is_causal=True, enable_gqa=grouped)
