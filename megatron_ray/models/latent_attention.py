"""Defines multi-head latent attention (DeepSeek-V2, section 2.1).

Owns: computing queries, keys and values from low-rank latents. Must not know: ranks,
groups.

Queries are projected from one latent, keys and values from another. Queries and keys
have a part without positions and a rotated part; the rotated part of the key is shared
by all heads. Training expands the latents to full keys and values and uses ordinary
attention. Generation caches full keys and values too, which is correct but larger than
a cache of latents.

Shapes: T = B x S tokens, B batch, S sequence, N query heads (of this rank), D width of
a head's query and key, P of that without positions, R rotated, D = P + R; V width of a
head's value, C that of the latent of keys and values.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_ray.config.architecture.latent import LatentAttentionConfig
from megatron_ray.config.architecture.positions import RopeScaling
from megatron_ray.config.model import ModelConfig
from megatron_ray.models.attention import CausalAttention, KeyValueCache
from megatron_ray.models.forward_context import ForwardContext
from megatron_ray.models.layers import LayerFactory
from megatron_ray.models.rope import rotates_in_fp32, yarn_magnitude
from megatron_ray.ops.autograd import AutogradFunction
from megatron_ray.ops.dtypes import to_fp32
from megatron_ray.sharding.model_specs import latent_attention_spec


class LatentAttention(CausalAttention):
    """x -> residual + O(softmax(scale Q K^T) V)."""

    def __init__(
        self,
        config: ModelConfig,
        mla: LatentAttentionConfig,
        layers: LayerFactory,
        path: str,
    ) -> None:
        super().__init__(layers, path, None, score_factor=1.0)
        self.mla = mla
        self.query_factor = query_factor(config.rope_scaling) * config.score_factor
        spec = latent_attention_spec(config, mla)
        # Under sequence parallelism a rank computes latents of its own tokens only. They
        # are gathered for the heads, which is cheap because latents are narrow.
        if spec.q is not None:
            self.q = layers.column(spec.q)
        if spec.q_down is not None and spec.q_norm is not None and spec.q_up is not None:
            self.q_down = layers.replicated(spec.q_down)
            self.q_norm = layers.norm(spec.q_norm)
            self.q_up = layers.column(spec.q_up)
        self.kv_down = layers.replicated(spec.kv_down)
        self.kv_norm = layers.norm(spec.kv_norm)
        self.kv_up = layers.column(spec.kv_up)
        self.rotated_key = layers.gather_from_sequence_parallel()
        self.o = layers.row(spec.o)

    def forward(
        self,
        x_TH: Tensor,
        residual_TH: Tensor | None,
        context: ForwardContext,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Returns residual (unless None) + attention, [T, H]."""
        shape = (context.batch_size, context.seq_length, -1)
        # One product each computes several parts of queries and keys, see the shapes above.
        queries = self._queries(x_TH)
        latent_TC, key_TR = self.kv_down(x_TH).split(
            [self.mla.kv_lora_rank, self.mla.qk_rope_head_dim], dim=1
        )
        keys_values = self.kv_up(self.kv_norm(latent_TC))
        shared_key = self.rotated_key(key_TR)
        q, k, v = _AssembleHeads.apply(
            queries.view(shape),
            keys_values.view(shape),
            shared_key.view(shape),
            context.cos,
            context.sin,
            self.mla,
            self.query_factor,
        )
        # Removes the padding of values to the width of keys.
        attended = self.attend(q, k, v, context, cache)[..., : self.mla.v_head_dim]
        num_tokens = context.batch_size * context.seq_length
        output: Tensor = self.o(
            attended.transpose(1, 2).reshape(num_tokens, -1), residual_TH
        )
        return output

    def _queries(self, x_TH: Tensor) -> Tensor:
        """Returns [T, N x D], before rotation."""
        if self.mla.q_lora_rank is None:
            queries: Tensor = self.q(x_TH)
        else:
            queries = self.q_up(self.q_norm(self.q_down(x_TH)))
        return queries


def query_factor(scaling: RopeScaling | None) -> float:
    """Returns the factor of scores besides 1 / sqrt(D).

    With YaRN it is m(mscale_all_dim) squared (DeepSeek-V2's published code).
    """
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    return yarn_magnitude(scaling.factor, scaling.mscale_all_dim) ** 2


class _AssembleHeads(AutogradFunction[tuple[Tensor, Tensor, Tensor]]):
    """Assembles q, k and v [B, N, S, D] from projections, with rotation.

    The projections are queries [B, S, N D], keys with values [B, S, N (P + V)] and the
    shared rotated part of keys [B, S, R].

    Values are padded with zeros to the width of keys, so that every attention kernel
    and every exchange between ranks supports them. In memory tokens come first, or
    heads if rotation is in fp32, as in `rope.RotateQKV`.

    A single function, so that forward and backward write each result into one tensor
    without concatenation, and only the angles are saved.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys_values: Tensor,
        shared_key: Tensor,
        cos: Tensor,
        sin: Tensor,
        mla: LatentAttentionConfig,
        factor: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The backward is linear in the gradients, so it needs angles but no activations.
        ctx.save_for_backward(cos, sin)
        ctx.mla = mla
        ctx.factor = factor
        q = _assemble_queries(_by_head(queries, mla.qk_head_dim), cos, sin, mla, factor)
        by_head = _by_head(keys_values, mla.qk_nope_head_dim + mla.v_head_dim)
        k = _assemble_keys(by_head, shared_key, cos, sin, mla)
        v = _empty_heads(by_head, mla.qk_head_dim)
        v[..., : mla.v_head_dim] = by_head[..., mla.qk_nope_head_dim :]
        v[..., mla.v_head_dim :] = 0
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    @staticmethod
    def backward(
        ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor
    ) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        mla: LatentAttentionConfig = ctx.mla
        plain = mla.qk_nope_head_dim
        grad_q = grad_q.transpose(1, 2)
        grad_k = grad_k.transpose(1, 2)
        grad_v = grad_v.transpose(1, 2)

        grad_queries = grad_q.new_empty(*grad_q.shape[:3], mla.qk_head_dim)
        # The inverse of a rotation is the rotation by the opposite angle.
        unrotated = _rotate(grad_q[..., plain:], cos, sin, -1.0)
        grad_queries[..., :plain] = _scale(grad_q[..., :plain], ctx.factor)
        grad_queries[..., plain:] = _scale(unrotated, ctx.factor)

        grad_keys_values = grad_q.new_empty(*grad_q.shape[:3], plain + mla.v_head_dim)
        grad_keys_values[..., :plain] = grad_k[..., :plain]
        grad_keys_values[..., plain:] = grad_v[..., : mla.v_head_dim]

        # All heads use the same rotated key, so its gradient is the sum over heads, in fp32
        # because there may be many.
        summed = to_fp32(grad_k[..., plain:]).sum(2, keepdim=True)
        grad_shared_key = _rotate(summed, cos, sin, -1.0).squeeze(2).to(grad_q.dtype)
        return (
            grad_queries.flatten(2),
            grad_keys_values.flatten(2),
            grad_shared_key,
            None,
            None,
            None,
            None,
        )


def _assemble_queries(
    queries: Tensor, cos: Tensor, sin: Tensor, mla: LatentAttentionConfig, factor: float
) -> Tensor:
    """Returns queries [B, S, N, D], scaled, with the last R elements rotated."""
    plain = mla.qk_nope_head_dim
    # Applied to the queries, since kernels scale scores by 1 / sqrt(D) only.
    q = _empty_heads(queries, mla.qk_head_dim)
    q[..., :plain] = _scale(queries[..., :plain], factor)
    q[..., plain:] = _scale(_rotate(queries[..., plain:], cos, sin, 1.0), factor)
    return q


def _assemble_keys(
    keys_values: Tensor,
    shared_key: Tensor,
    cos: Tensor,
    sin: Tensor,
    mla: LatentAttentionConfig,
) -> Tensor:
    """Returns keys [B, S, N, D]: P elements of each head, then the shared R elements."""
    plain = mla.qk_nope_head_dim
    k = _empty_heads(keys_values, mla.qk_head_dim)
    k[..., :plain] = keys_values[..., :plain]
    k[..., plain:] = _rotate(shared_key[:, :, None], cos, sin, 1.0)
    return k


def _scale(x: Tensor, factor: float) -> Tensor:
    if factor == 1.0:
        return x
    return x * factor


def _by_head(x: Tensor, width: int) -> Tensor:
    """Returns a view [B, S, N, width] of [B, S, N x width]."""
    return x.view(*x.shape[:2], -1, width)


def _empty_heads(like: Tensor, width: int) -> Tensor:
    """Returns uninitialised memory [B, S, N, width] for the heads of `like`."""
    batch, sequence, heads, _ = like.shape
    # Heads first in memory where products are batched over heads, tokens first elsewhere.
    if rotates_in_fp32(like.device.type, like.dtype):
        return like.new_empty(batch, heads, sequence, width).transpose(1, 2)
    return like.new_empty(batch, sequence, heads, width)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    """Returns x [B, S, heads, R] rotated by direction x angle.

    The result has the type of the angles if that is wider.
    """
    half = x.shape[-1] // 2
    first = x[..., :half]
    second = x[..., half:]
    # `rotary_angles` duplicates both halves and negates the first half of the sine.
    cos = cos[..., half:]
    sin = sin[..., half:] * direction
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
