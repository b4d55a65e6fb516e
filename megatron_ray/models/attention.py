"""Defines causal self-attention with grouped key/value heads.

Owns: the maths of one attention layer. Must not know: ranks, groups.

Shapes: T = B x S tokens, B batch, S sequence, N query heads, G key/value heads, D head
width. The projection has the number of local heads, so this file is independent of
tensor parallelism.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_ray.config.model import ModelConfig
from megatron_ray.distributed.device_kind import DeviceKind
from megatron_ray.models.batch import Packed
from megatron_ray.models.forward_context import ForwardContext
from megatron_ray.models.layers import LayerFactory
from megatron_ray.models.rope import ROTATION, RotateQKV, split_qkv
from megatron_ray.ops.attention.blockwise import causal_attention
from megatron_ray.ops.attention.choice import attention_kernel, document_kernel
from megatron_ray.ops.attention.fp32 import fp32_causal_attention
from megatron_ray.ops.attention.fused import band
from megatron_ray.ops.attention.sliding_window import masked_attention, windowed_attention
from megatron_ray.ops.attention.varlen import varlen_attention
from megatron_ray.ops.dtypes import precision_of
from megatron_ray.sharding.model_specs import attention_spec


@dataclass
class KeyValueCache:
    """Keys and values of one layer for all previous tokens.

    The tensors [B, G, S, D] are allocated for the longest sequence.
    """

    keys: Tensor
    values: Tensor
    length: int = 0
    """Number of stored tokens."""

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores new [B, G, S, D] entries and returns everything so far.

        Raises ValueError when the cache is full.
        """
        # Written in place, because concatenation would copy all tokens for each new one.
        end = self.length + keys.shape[2]
        if end > self.keys.shape[2]:
            raise ValueError(
                f"the cache has room for {self.keys.shape[2]} tokens, {end} are needed"
            )
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class CausalAttention(nn.Module):
    """softmax(f Q K^T / sqrt(D)) V; subclasses compute queries, keys and values."""

    def __init__(
        self, layers: LayerFactory, path: str, window: int | None, score_factor: float
    ) -> None:
        """Creates the attention of the layer at `path`, which names its random numbers.

        `window`: tokens that a token sees, itself included; None for all. `score_factor`:
        f above.
        """
        super().__init__()
        self.score_factor = score_factor
        self.window = window
        self.core = layers.attention(window)
        self.core_with_dropout = layers.attention_with_dropout(
            f"{path}.probabilities", window
        )

    def attend(
        self,
        q_BNSD: Tensor,
        k_BGSD: Tensor,
        v_BGSD: Tensor,
        context: ForwardContext,
        cache: KeyValueCache | None,
    ) -> Tensor:
        """Returns the attention outputs of each head, [B, N, S, D]."""
        if self.score_factor != 1.0:
            # On queries, so that every kernel has it.
            q_BNSD = q_BNSD * self.score_factor
        if cache is not None:
            return self._attend_with_cache(q_BNSD, k_BGSD, v_BGSD, cache)
        # Dropout needs another implementation, see `AttentionWithDropout`; passes without
        # dropout use the fused kernels.
        if self.core_with_dropout is not None and context.mode.is_training:
            dropped: Tensor = self.core_with_dropout(
                q_BNSD, k_BGSD, v_BGSD, context.packed, context.dropout_sample
            )
            return dropped
        attended: Tensor = self.core(q_BNSD, k_BGSD, v_BGSD, context.packed)
        return attended

    def _attend_with_cache(
        self, q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, cache: KeyValueCache
    ) -> Tensor:
        num_cached = cache.length
        k_BGSD, v_BGSD = cache.append(k_BGSD, v_BGSD)
        if not num_cached:
            # The prompt has as many queries as keys, as in training.
            attended: Tensor = self.core(q_BNSD, k_BGSD, v_BGSD, None)
            return attended
        # New tokens attend to the window before them, or to all tokens.
        window = self.window or k_BGSD.shape[2]
        # The oldest key that the first new query attends to.
        first = max(0, num_cached - window + 1)
        k_BGSD = k_BGSD[:, :, first:]
        v_BGSD = v_BGSD[:, :, first:]
        mask = band(
            q_BNSD.shape[2], k_BGSD.shape[2], num_cached - first, window, q_BNSD.device
        )
        is_grouped = q_BNSD.shape[1] > k_BGSD.shape[1]
        return nn.functional.scaled_dot_product_attention(
            q_BNSD, k_BGSD, v_BGSD, attn_mask=mask, enable_gqa=is_grouped
        )


class Attention(CausalAttention):
    """x -> residual + O(softmax(Q K^T / sqrt(D)) V).

    Queries and keys are first normalised, then rotated, if the model does so.
    """

    def __init__(
        self, config: ModelConfig, layers: LayerFactory, path: str, window: int | None
    ) -> None:
        super().__init__(layers, path, window, config.score_factor)
        self.head_width = config.head_width
        # `apply_compile` replaces it by a compiled one.
        self.rotation = ROTATION
        spec = attention_spec(config)
        self.qkv = layers.qkv(spec.qkv)
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if spec.q_norm is not None and spec.k_norm is not None:
            self.q_norm = layers.norm(spec.q_norm)
            self.k_norm = layers.norm(spec.k_norm)
        self.o = layers.row(spec.o)

    def forward(
        self,
        x_TH: Tensor,
        residual_TH: Tensor | None,
        context: ForwardContext,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Returns residual (unless None) + attention, [T, H]."""
        qkv: Tensor = self.qkv(x_TH).view(context.batch_size, context.seq_length, -1)
        sizes = (self.qkv.heads, self.qkv.groups, self.head_width)
        if self.q_norm is not None and self.k_norm is not None:
            qkv = _normalize_queries_and_keys(qkv, self.q_norm, self.k_norm, sizes)
        if context.cos is not None:
            q, k, v = RotateQKV.apply(qkv, context.cos, context.sin, sizes, self.rotation)
        else:
            q, k, v = split_qkv(qkv, *sizes)
        attended = self.attend(q, k, v, context, cache)
        # Most kernels return tokens first in memory, so that merging the heads is a view.
        num_tokens = context.batch_size * context.seq_length
        output: Tensor = self.o(
            attended.transpose(1, 2).reshape(num_tokens, -1), residual_TH
        )
        return output


def _normalize_queries_and_keys(
    qkv: Tensor, q_norm: nn.Module, k_norm: nn.Module, sizes: tuple[int, int, int]
) -> Tensor:
    """Returns the fused [B, S, (N + 2 G) D] with each query and key normalised.

    `sizes`: N, G, D.
    """
    heads, groups, width = sizes
    q, k, v = torch.split(qkv, [heads * width, groups * width, groups * width], dim=-1)
    # Norms process rows of a head's width and save them for the backward pass. Always
    # copied, because a view of a single head would keep all of qkv in memory.
    q_rows = q.reshape(-1, width).contiguous()
    k_rows = k.reshape(-1, width).contiguous()
    normalized_q: Tensor = q_norm(q_rows).view(q.shape)
    normalized_k: Tensor = k_norm(k_rows).view(k.shape)
    return torch.cat([normalized_q, normalized_k, v], -1)


class LocalAttention(nn.Module):
    """Causal attention over sequences that are not split over ranks.

    `device` determines the kernel. `window`: tokens that a token attends to, itself
    included; None for all.
    """

    def __init__(self, device: DeviceKind, window: int | None = None) -> None:
        super().__init__()
        self.device = device
        self.window = window

    def forward(
        self, q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, packed: Packed | None
    ) -> Tensor:
        """Returns the attention outputs [B, N, S, D], within documents if `packed`."""
        if packed is None:
            return self._attend_whole(q_BNSD, k_BGSD, v_BGSD)
        kernel = document_kernel(
            self.device, precision=precision_of(q_BNSD.dtype), head_width=q_BNSD.shape[-1]
        )
        if kernel == "varlen":
            return varlen_attention(
                q_BNSD, k_BGSD, v_BGSD, packed.cu_seqlens, packed.longest, self.window
            )
        # One call per document, so that no scores between documents are computed.
        rows = []
        for row, lengths in enumerate(packed.lengths):
            documents = zip(
                torch.split(q_BNSD[row : row + 1], list(lengths), dim=2),
                torch.split(k_BGSD[row : row + 1], list(lengths), dim=2),
                torch.split(v_BGSD[row : row + 1], list(lengths), dim=2),
                strict=True,
            )
            attended = [self._attend_whole(q, k, v) for q, k, v in documents]
            rows.append(torch.cat(attended, dim=2))
        return torch.cat(rows)

    def _attend_whole(self, q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
        """Computes attention within rows of one sequence each, by the device's kernel."""
        precision = precision_of(q_BNSD.dtype)
        window = self.window
        kernel = attention_kernel(
            self.device, precision=precision, sequence=q_BNSD.shape[2], window=window
        )
        if kernel == "masked":
            assert window is not None
            return masked_attention(q_BNSD, k_BGSD, v_BGSD, window)
        if kernel == "stripes":
            assert window is not None
            in_fp32 = self.device.needs_fp32(precision)
            return windowed_attention(q_BNSD, k_BGSD, v_BGSD, window, in_fp32=in_fp32)
        if kernel == "fused_in_fp32":
            return fp32_causal_attention(q_BNSD, k_BGSD, v_BGSD)
        if kernel == "blocks":
            return causal_attention(q_BNSD, k_BGSD, v_BGSD)
        is_grouped = q_BNSD.shape[1] != k_BGSD.shape[1]
        return nn.functional.scaled_dot_product_attention(
            q_BNSD, k_BGSD, v_BGSD, is_causal=True, enable_gqa=is_grouped
        )
