"""Causal self-attention with grouped key/value heads.

Owns: the maths of one attention layer. Must not know: ranks, groups.

Shapes: T = B x S tokens, B batch, S sequence, N query heads, G key/value heads, D head
width. How many heads are here is what the projection says, so tensor parallelism
shrinks them unseen.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_ray.config.model import ModelConfig
from megatron_ray.distributed.device_kind import DeviceKind
from megatron_ray.models.batch import Packed
from megatron_ray.models.layers import Layers
from megatron_ray.models.rope import ROTATION, RotateQKV, split_qkv
from megatron_ray.ops.attention.blockwise import causal_attention
from megatron_ray.ops.attention.choice import attention_kernel
from megatron_ray.ops.attention.fp32 import fp32_causal_attention
from megatron_ray.ops.attention.fused import band
from megatron_ray.ops.attention.sliding_window import masked_attention, windowed_attention
from megatron_ray.sharding.model_specs import attention_spec


@dataclass
class KeyValueCache:
    """Keys and values of the tokens so far, [B, G, S, D] with room for `capacity`
    tokens; one per layer.
    """

    keys: Tensor
    values: Tensor
    length: int = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores new [B, G, S, D] entries and returns everything so far.

        Raises ValueError when there is no room.
        """
        end = self.length + keys.shape[2]
        if end > self.keys.shape[2]:
            raise ValueError(
                f"the cache has room for {self.keys.shape[2]} tokens, {end} are needed"
            )
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


@dataclass(frozen=True)
class ForwardContext:
    """What a block needs to know of a batch besides its activations: its shape, with
    rotary positions the cos and sin [B or 1, S, 1, D], its documents, and what its
    routers are told or are to tell.
    """

    batch: int
    sequence: int
    cos: Tensor | None
    sin: Tensor | None
    packed: Packed | None = None
    routing_replay: Tensor | None = None
    """[T, layers, K]: the experts that routers are to take instead of choosing."""
    on_route: Callable[[int, Tensor], None] | None = None
    """Hears of every router's choice: (layer, experts [tokens of this rank, K])."""
    first_sample: int | None = None
    """Of the batch, where dropout is to drop."""


class CausalAttention(nn.Module):
    """softmax(Q K^T / sqrt(D)) V, whoever makes queries, keys and values."""

    def __init__(self, layers: Layers, place: str, window: int | None) -> None:
        """`window`: tokens that a token sees, itself included; None for all."""
        super().__init__()
        self.window = window
        self.core = layers.attention(window)
        self.core_with_dropout = layers.attention_with_dropout(
            f"{place}.probabilities", window
        )

    def attended(
        self,
        q_BNSD: Tensor,
        k_BGSD: Tensor,
        v_BGSD: Tensor,
        positions: ForwardContext,
        cache: KeyValueCache | None,
    ) -> Tensor:
        """[B, N, S, D]"""
        if cache is not None:
            return self._attend_cached(q_BNSD, k_BGSD, v_BGSD, cache)
        return self._attend(q_BNSD, k_BGSD, v_BGSD, positions)

    def _attend(
        self, q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, positions: ForwardContext
    ) -> Tensor:
        if self.core_with_dropout is None or positions.first_sample is None:
            attended: Tensor = self.core(q_BNSD, k_BGSD, v_BGSD, positions.packed)
        else:
            attended = self.core_with_dropout(
                q_BNSD, k_BGSD, v_BGSD, (positions.packed, positions.first_sample)
            )
        return attended

    def _attend_cached(
        self, q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, cache: KeyValueCache
    ) -> Tensor:
        seen = cache.length
        k_BGSD, v_BGSD = cache.append(k_BGSD, v_BGSD)
        if not seen:
            prompt: Tensor = self.core(q_BNSD, k_BGSD, v_BGSD, None)
            return prompt
        # The new tokens see the window before them, or everything.
        window = self.window or k_BGSD.shape[2]
        first = max(0, seen - window + 1)
        k_BGSD = k_BGSD[:, :, first:]
        v_BGSD = v_BGSD[:, :, first:]
        mask = band(q_BNSD.shape[2], k_BGSD.shape[2], seen - first, window, q_BNSD.device)
        grouped = q_BNSD.shape[1] > k_BGSD.shape[1]
        return nn.functional.scaled_dot_product_attention(
            q_BNSD, k_BGSD, v_BGSD, attn_mask=mask, enable_gqa=grouped
        )


class Attention(CausalAttention):
    """x -> residual + O(softmax(Q K^T / sqrt(D)) V); without the residual where none is
    given.

    Queries and keys are normed first, then rotated, where the model has either.
    """

    def __init__(
        self, config: ModelConfig, layers: Layers, place: str, window: int | None
    ) -> None:
        super().__init__(layers, place, window)
        self.head_width = config.head_width
        self.rotation = ROTATION
        spec = attention_spec(config)
        self.qkv = layers.qkv(spec.qkv)
        self.q_norm = layers.norm(spec.q_norm) if spec.q_norm is not None else None
        self.k_norm = layers.norm(spec.k_norm) if spec.k_norm is not None else None
        self.o = layers.row(spec.o)

    def forward(
        self,
        x_TH: Tensor,
        residual_TH: Tensor | None,
        positions: ForwardContext,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        qkv: Tensor = self.qkv(x_TH).view(positions.batch, positions.sequence, -1)
        heads = self.qkv.heads
        groups = self.qkv.groups
        if self.q_norm is not None and self.k_norm is not None:
            qkv = _normed(qkv, self.q_norm, self.k_norm, (heads, groups, self.head_width))
        if positions.cos is not None:
            sizes = heads, groups, self.head_width
            q, k, v = RotateQKV.apply(
                qkv, positions.cos, positions.sin, sizes, self.rotation
            )  # type: ignore[no-untyped-call]
        else:
            q, k, v = split_qkv(qkv, heads, groups, self.head_width)
        attended = self.attended(q, k, v, positions, cache)
        merged = attended.transpose(1, 2).reshape(
            positions.batch * positions.sequence, heads * self.head_width
        )
        output: Tensor = self.o(merged, residual_TH)
        return output


def _normed(
    qkv: Tensor, q_norm: nn.Module, k_norm: nn.Module, sizes: tuple[int, int, int]
) -> Tensor:
    """The fused [B, S, (N + 2 G) D] with each head's query and key normalised; `sizes`:
    N, G, D.
    """
    heads, groups, width = sizes
    q, k, v = torch.split(qkv, [heads * width, groups * width, groups * width], dim=-1)
    # Rows of a head's width; always copies, which the norms keep: a view of a single
    # head would keep the whole of qkv.
    parts = [
        norm(part.reshape(-1, width).contiguous()).view(part.shape)
        for norm, part in ((q_norm, q), (k_norm, k))
    ]
    return torch.cat([*parts, v], -1)


class LocalAttention(nn.Module):
    """Causal attention of sequences that lie whole on this rank; over the last `window`
    tokens where one is given.
    """

    def __init__(self, device: DeviceKind, window: int | None = None) -> None:
        """`device`: what it runs on, which decides the kernel."""
        super().__init__()
        self.device = device
        self.window = window

    def forward(
        self, q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, packed: Packed | None
    ) -> Tensor:
        if packed is None:
            return self._whole(q_BNSD, k_BGSD, v_BGSD)
        rows = []
        for row, lengths in enumerate(packed.lengths):
            documents = zip(
                *(
                    torch.split(x[row : row + 1], list(lengths), dim=2)
                    for x in (q_BNSD, k_BGSD, v_BGSD)
                ),
                strict=True,
            )
            rows.append(torch.cat([self._whole(q, k, v) for q, k, v in documents], dim=2))
        return torch.cat(rows)

    def _whole(self, q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
        """Every row is one sequence."""
        bf16 = q_BNSD.dtype == torch.bfloat16
        window = self.window
        kernel = attention_kernel(
            self.device, bf16=bf16, sequence=q_BNSD.shape[2], window=window
        )
        if kernel == "masked":
            assert window is not None
            return masked_attention(q_BNSD, k_BGSD, v_BGSD, window)
        if kernel == "stripes":
            assert window is not None
            wide = self.device.widens(bf16)
            return windowed_attention(q_BNSD, k_BGSD, v_BGSD, window, wide=wide)
        if kernel == "fused_in_fp32":
            return fp32_causal_attention(q_BNSD, k_BGSD, v_BGSD)
        if kernel == "blocks":
            return causal_attention(q_BNSD, k_BGSD, v_BGSD)
        grouped = q_BNSD.shape[1] != k_BGSD.shape[1]
        return nn.functional.scaled_dot_product_attention(
            q_BNSD, k_BGSD, v_BGSD, is_causal=True, enable_gqa=grouped
        )
