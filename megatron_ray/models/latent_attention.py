"""Multi-head latent attention (DeepSeek-V2, section 2.1).

Owns: how queries, keys and values come from low-rank latents. Must not know: ranks,
groups.

Queries come from one latent, keys and values together from another; a head's query and
key have a part without positions and a rotated part, and the rotated part of the key is
one for all heads. Training makes full keys and values of the latents and attends as
usual, and so does the cache of generation, which is larger than it need be, and right.

Shapes: T = B x S tokens, B batch, S sequence, N query heads (as held on this rank), D
width of a head's query and key, P of that without positions, R rotated, D = P + R; V
width of a head's value, C that of the latent of keys and values.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_ray.config.latent import LatentAttentionConfig
from megatron_ray.config.model import ModelConfig
from megatron_ray.config.positions import RopeScaling
from megatron_ray.models.attention import CausalAttention, ForwardContext, KeyValueCache
from megatron_ray.models.layers import Layers
from megatron_ray.models.rope import rotates_in_fp32, yarn_magnitude
from megatron_ray.ops.dtypes import to_fp32
from megatron_ray.sharding.model_specs import latent_attention_spec


class LatentAttention(CausalAttention):
    """x -> residual (if given) + O(softmax(scale Q K^T) V)."""

    def __init__(
        self, config: ModelConfig, mla: LatentAttentionConfig, layers: Layers, place: str
    ) -> None:
        super().__init__(layers, place, None)
        self.mla = mla
        self.query_factor = query_factor(config.rope_scaling)
        spec = latent_attention_spec(config, mla)
        # The latents are made of the tokens that are here; what the heads read of them
        # is gathered, and is little.
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
        positions: ForwardContext,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        shape = positions.batch, positions.sequence, -1
        queries = (
            self.q(x_TH)
            if self.mla.q_lora_rank is None
            else self.q_up(self.q_norm(self.q_down(x_TH)))
        )
        latent_TC, key_TR = self.kv_down(x_TH).split(
            [self.mla.kv_lora_rank, self.mla.qk_rope_head_dim], dim=1
        )
        keys_values = self.kv_up(self.kv_norm(latent_TC))
        key = self.rotated_key(key_TR)
        q, k, v = _Heads.apply(  # type: ignore[no-untyped-call]
            queries.view(shape),
            keys_values.view(shape),
            key.view(shape),
            positions.cos,
            positions.sin,
            self.mla,
            self.query_factor,
        )
        attended = self.attended(q, k, v, positions, cache)[..., : self.mla.v_head_dim]
        output: Tensor = self.o(
            attended.transpose(1, 2).reshape(positions.batch * positions.sequence, -1),
            residual_TH,
        )
        return output


def query_factor(scaling: RopeScaling | None) -> float:
    """What scores are multiplied by beside 1 / sqrt(D): under YaRN m(mscale_all_dim)
    squared (DeepSeek-V2's published code).
    """
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    return yarn_magnitude(scaling.factor, scaling.mscale_all_dim) ** 2


class _Heads(torch.autograd.Function):
    """Queries [B, S, N D], keys with values [B, S, N (P + V)] and the rotated part of
    all keys [B, S, R] -> q, k and v [B, N, S, D].

    Values are filled up with zeros to the width of keys: every kernel and every
    exchange between ranks takes them then, and zeros add nothing. In memory tokens come
    first, or heads where rotation is in fp32, as in `rope.RotateQKV`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys_values: Tensor,
        key: Tensor,
        cos: Tensor,
        sin: Tensor,
        mla: LatentAttentionConfig,
        factor: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)

        ctx.mla = mla
        ctx.factor = factor
        plain = mla.qk_nope_head_dim
        rotated = mla.qk_rope_head_dim
        value = mla.v_head_dim
        q_plain, q_rotated = torch.split(
            _by_head(queries, mla.qk_head_dim), [plain, rotated], -1
        )
        k_plain, values = torch.split(
            _by_head(keys_values, plain + value), [plain, value], -1
        )
        q, k, v = (_room(queries, q_plain.shape[2], mla.qk_head_dim) for _ in range(3))
        q[..., :plain] = _times(q_plain, factor)
        q[..., plain:] = _times(_rotated(q_rotated, cos, sin, 1.0), factor)
        k[..., :plain] = k_plain
        k[..., plain:] = _rotated(key[:, :, None], cos, sin, 1.0)
        v[..., :value] = values
        v[..., value:] = 0
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    @staticmethod
    def backward(
        ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor
    ) -> tuple[Tensor | None, ...]:
        (cos, sin) = ctx.saved_tensors
        mla = ctx.mla
        factor = ctx.factor
        plain = mla.qk_nope_head_dim
        rotated = mla.qk_rope_head_dim
        value = mla.v_head_dim
        q, k, v = (grad.transpose(1, 2) for grad in (grad_q, grad_k, grad_v))
        queries = q.new_empty(*q.shape[:3], plain + rotated)
        keys_values = q.new_empty(*q.shape[:3], plain + value)
        queries[..., :plain] = _times(q[..., :plain], factor)
        queries[..., plain:] = _times(_rotated(q[..., plain:], cos, sin, -1.0), factor)
        keys_values[..., :plain] = k[..., :plain]
        keys_values[..., plain:] = v[..., :value]
        key = (
            _rotated(to_fp32(k[..., plain:]).sum(2, keepdim=True), cos, sin, -1.0)
            .squeeze(2)
            .to(q.dtype)
        )
        return queries.flatten(2), keys_values.flatten(2), key, None, None, None, None


def _times(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1.0 else x * factor


def _by_head(x: Tensor, width: int) -> Tensor:
    """[B, S, N x width] -> [B, S, N, width]."""
    return x.view(*x.shape[:2], -1, width)


def _room(like: Tensor, heads: int, width: int) -> Tensor:
    """Memory for [B, S, heads, width]."""
    batch, sequence = like.shape[:2]
    if rotates_in_fp32(like.device.type, like.dtype):
        return like.new_empty(batch, heads, sequence, width).transpose(1, 2)
    return like.new_empty(batch, sequence, heads, width)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    """X [B, S, heads, R] rotated by direction x angle, in the type of the angles if
    that is wider.
    """
    half = x.shape[-1] // 2
    first = x[..., :half]
    second = x[..., half:]
    cos = cos[..., half:]
    sin = sin[..., half:] * direction
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
