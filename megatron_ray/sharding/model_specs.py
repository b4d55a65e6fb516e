"""Declares the layers of a model in the order of its forward pass.

A block is a tree of dataclasses. Field names are module names and, joined by dots,
parameter names; their order is that of the parameter table. Modules get their layers
from here, so each weight's size is defined once. Pure Python. Must not know: torch,
ranks, sharding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from megatron_ray.config.architecture.latent import LatentAttentionConfig
from megatron_ray.config.architecture.moe import MoEConfig
from megatron_ray.config.model import ModelConfig
from megatron_ray.sharding.expert_specs import GroupedColumnSpec, GroupedRowSpec
from megatron_ray.sharding.layer_specs import (
    ColumnSpec,
    NormSpec,
    Output,
    QKVSpec,
    ReplicatedSpec,
    RowSpec,
    VocabularySpec,
)
from megatron_ray.sharding.parameter_types import Init

# ---- attention


@dataclass(frozen=True)
class AttentionSpec:
    """The layers of multi-head or grouped-query attention."""

    qkv: QKVSpec
    q_norm: NormSpec | None
    k_norm: NormSpec | None
    o: RowSpec


def attention_spec(model: ModelConfig) -> AttentionSpec:
    """Returns the layers of a model's attention."""
    heads = model.num_attention_heads
    groups = model.kv_heads
    # In the order in which attention splits the product.
    qkv = QKVSpec(
        inputs=model.hidden_size,
        outputs=(
            Output("q", heads * model.head_width),
            Output("k", groups * model.head_width, num_heads=groups),
            Output("v", groups * model.head_width, num_heads=groups),
        ),
        init=_normal(model),
        bias=model.has_qkv_bias,
        heads=heads,
        groups=groups,
    )
    # One vector shared by all heads, for queries and for keys.
    head_norm = None
    if model.qk_norm:
        head_norm = norm_spec(model, model.head_width, is_over_heads=True)
    # The width of all heads may differ from the hidden size.
    o = _attention_output(model, heads * model.head_width)
    return AttentionSpec(qkv, head_norm, head_norm, o)


@dataclass(frozen=True)
class LatentAttentionSpec:
    """The layers of multi-head latent attention.

    Heads are sharded over tp; the layers before them are replicated. Queries are
    computed either by `q` or from a latent by `q_down`, `q_norm` and `q_up`.
    """

    q: ColumnSpec | None
    q_down: ReplicatedSpec | None
    q_norm: NormSpec | None
    q_up: ColumnSpec | None
    kv_down: ReplicatedSpec
    kv_norm: NormSpec
    kv_up: ColumnSpec
    o: RowSpec


def latent_attention_spec(
    model: ModelConfig, mla: LatentAttentionConfig
) -> LatentAttentionSpec:
    """Returns the layers of a model's latent attention."""
    heads = model.num_attention_heads
    q = None
    q_down = None
    q_norm = None
    q_up = None
    # `q` and the `_up` layers are sharded by heads and need no replicas, since latent
    # attention has as many key/value heads as query heads.
    queries = heads * mla.qk_head_dim
    if mla.q_lora_rank is None:
        q = _column(model, model.hidden_size, queries, "q")
    else:
        q_down = _to_latent(model, mla.q_lora_rank)
        q_norm = norm_spec(model, mla.q_lora_rank, eps=mla.norm_eps)
        q_up = _column(model, mla.q_lora_rank, queries, "q_up")
    # All heads share the rotated part of the key, which is computed with the latent.
    latent = mla.kv_lora_rank
    keys_values = heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    return LatentAttentionSpec(
        q=q,
        q_down=q_down,
        q_norm=q_norm,
        q_up=q_up,
        kv_down=_to_latent(model, latent + mla.qk_rope_head_dim),
        kv_norm=norm_spec(model, latent, eps=mla.norm_eps),
        kv_up=_column(model, latent, keys_values, "kv_up"),
        o=_attention_output(model, heads * mla.v_head_dim),
    )


# ---- feed-forward


@dataclass(frozen=True)
class GatedMLPSpec:
    """The layers of an MLP with a gate."""

    gate_up: ColumnSpec
    down: RowSpec


@dataclass(frozen=True)
class PlainMLPSpec:
    """The layers of an MLP without a gate."""

    up: ColumnSpec
    down: RowSpec


def gated_mlp_spec(model: ModelConfig, width: int) -> GatedMLPSpec:
    """Returns the layers of an MLP that is `width` wide inside."""
    # The gate comes first: the activation splits the product into halves.
    gate_up = _fused_column(model, model.hidden_size, ("gate", "up"), width)
    return GatedMLPSpec(gate_up, _mlp_output(model, width))


def plain_mlp_spec(model: ModelConfig, width: int) -> PlainMLPSpec:
    """Returns the layers of an MLP that is `width` wide inside."""
    up = _fused_column(model, model.hidden_size, ("up",), width)
    return PlainMLPSpec(up, _mlp_output(model, width))


def mlp_spec(model: ModelConfig, width: int) -> GatedMLPSpec | PlainMLPSpec:
    """Returns the layers of a model's kind of MLP."""
    if model.gated:
        return gated_mlp_spec(model, width)
    return plain_mlp_spec(model, width)


@dataclass(frozen=True)
class GatedExpertsSpec:
    """The layers of experts with a gate."""

    gate_up: GroupedColumnSpec
    down: GroupedRowSpec


@dataclass(frozen=True)
class PlainExpertsSpec:
    """The layers of experts without a gate."""

    up: GroupedColumnSpec
    down: GroupedRowSpec


def gated_experts_spec(model: ModelConfig, num_experts: int) -> GatedExpertsSpec:
    """Returns the layers of a mixture's experts."""
    gate_up = _grouped_column(model, num_experts, ("gate", "up"))
    return GatedExpertsSpec(gate_up, _grouped_row(model, num_experts))


def plain_experts_spec(model: ModelConfig, num_experts: int) -> PlainExpertsSpec:
    """Returns the layers of a mixture's experts."""
    up = _grouped_column(model, num_experts, ("up",))
    return PlainExpertsSpec(up, _grouped_row(model, num_experts))


@dataclass(frozen=True)
class MoESpec:
    """The layers of a mixture of experts."""

    router: ReplicatedSpec
    experts: GatedExpertsSpec | PlainExpertsSpec
    shared: GatedMLPSpec | PlainMLPSpec | None


def moe_spec(model: ModelConfig, moe: MoEConfig) -> MoESpec:
    """Returns the layers of a model's mixture of experts."""
    experts: GatedExpertsSpec | PlainExpertsSpec
    if model.gated:
        experts = gated_experts_spec(model, moe.num_experts)
    else:
        experts = plain_experts_spec(model, moe.num_experts)
    # The shared expert processes every token, so it is an ordinary MLP, sharded over tp.
    shared = None
    if moe.shared_expert_ffn_hidden_size is not None:
        shared = mlp_spec(model, moe.shared_expert_ffn_hidden_size)
    # Replicated, because every rank routes its own tokens to all experts.
    router = replicated_spec(model, model.hidden_size, moe.num_experts)
    return MoESpec(router, experts, shared)


# ---- blocks and what is around them


@dataclass(frozen=True)
class BlockSpec:
    """The layers of a transformer block; either an MLP or a mixture of experts."""

    attention_norm: NormSpec
    attention: AttentionSpec | LatentAttentionSpec
    attention_output_norm: NormSpec | None
    mlp_norm: NormSpec
    mlp: GatedMLPSpec | PlainMLPSpec | None
    moe: MoESpec | None
    mlp_output_norm: NormSpec | None


def block_spec(model: ModelConfig, layer: int) -> BlockSpec:
    """Returns the layers of a block; `layer` counts over the whole model, MTP included."""
    attention: AttentionSpec | LatentAttentionSpec
    if model.mla is None:
        attention = attention_spec(model)
    else:
        attention = latent_attention_spec(model, model.mla)
    # MTP layers continue the numbering, and have experts if the model has any.
    mlp = None
    moe = None
    moe_config = model.experts_on(layer)
    if moe_config is None:
        mlp = mlp_spec(model, model.ffn_width)
    else:
        moe = moe_spec(model, moe_config)
    # All norms share a declaration; the field names distinguish their weights.
    norm = norm_spec(model, model.hidden_size)
    output_norm = norm if model.peri_norm else None
    return BlockSpec(norm, attention, output_norm, norm, mlp, moe, output_norm)


@dataclass(frozen=True)
class MTPSpec:
    """The layers of multi-token prediction at one depth."""

    embedding_norm: NormSpec
    hidden_norm: NormSpec
    projection: ReplicatedSpec
    block: BlockSpec
    final_norm: NormSpec


def mtp_spec(model: ModelConfig, depth: int) -> MTPSpec:
    """Returns the layers of multi-token prediction at a depth, which counts from 0."""
    norm = norm_spec(model, model.hidden_size)
    # Its input is the concatenation of the next token's embedding and the hidden state.
    projection = replicated_spec(model, 2 * model.hidden_size, model.hidden_size)
    return MTPSpec(
        norm, norm, projection, block_spec(model, model.num_layers + depth), norm
    )


def vocabulary_spec(
    model: ModelConfig,
    *,
    logical_name: str | None = None,
    is_shared_embedding: bool = False,
    owns_norm: bool = True,
) -> VocabularySpec:
    """Returns the word embedding or the head of a model."""
    return VocabularySpec(
        model.vocabulary,
        model.vocab_multiple,
        model.hidden_size,
        Init("normal", model.init_std),
        logical_name,
        is_shared_embedding,
        owns_norm,
    )


def position_embedding_spec(model: ModelConfig) -> ReplicatedSpec:
    """Returns the table of learned positions."""
    # A row per position, as [outputs, inputs]; not sharded, because it is small.
    init = Init("normal", model.init_std)
    return ReplicatedSpec(model.hidden_size, model.max_sequence_length, init, is_table=True)


# ---- single layers


def norm_spec(
    model: ModelConfig,
    width: int,
    *,
    eps: float | None = None,
    is_over_heads: bool = False,
) -> NormSpec:
    """Returns a norm of a model's kind, with the model's eps unless one is given."""
    return NormSpec(
        width,
        eps or model.norm_eps,
        bias=model.norm == "layernorm",
        zero_centered=model.zero_centered_norm,
        is_over_heads=is_over_heads,
    )


def replicated_spec(model: ModelConfig, inputs: int, outputs: int) -> ReplicatedSpec:
    """Returns a matrix of a block that is replicated on every rank."""
    return ReplicatedSpec(inputs, outputs, _normal(model))


def _to_latent(model: ModelConfig, outputs: int) -> ReplicatedSpec:
    """Returns the projection from hidden states to a latent."""
    return ReplicatedSpec(model.hidden_size, outputs, _normal(model), model.has_qkv_bias)


def _column(model: ModelConfig, inputs: int, outputs: int, name: str) -> ColumnSpec:
    return ColumnSpec(inputs, (Output(name, outputs),), _normal(model))


def _fused_column(
    model: ModelConfig, inputs: int, names: Sequence[str], width: int
) -> ColumnSpec:
    # Each weight is sharded separately, so a rank has matching rows of all of them.
    outputs = tuple(Output(name, width) for name in names)
    return ColumnSpec(inputs, outputs, _normal(model), model.has_mlp_bias)


# Outputs of these two are added to the residual stream.


def _attention_output(model: ModelConfig, inputs: int) -> RowSpec:
    bias = model.has_attention_output_bias
    return RowSpec(inputs, model.hidden_size, _residual_init(model), bias)


def _mlp_output(model: ModelConfig, inputs: int) -> RowSpec:
    bias = model.has_mlp_bias
    return RowSpec(inputs, model.hidden_size, _residual_init(model), bias)


def _grouped_column(
    model: ModelConfig, num_experts: int, names: tuple[str, ...]
) -> GroupedColumnSpec:
    hidden = model.hidden_size
    width = model.expert_width
    return GroupedColumnSpec(num_experts, hidden, width, names, _normal(model))


def _grouped_row(model: ModelConfig, num_experts: int) -> GroupedRowSpec:
    hidden = model.hidden_size
    width = model.expert_width
    return GroupedRowSpec(num_experts, width, hidden, "down", _residual_init(model))


def _normal(model: ModelConfig) -> Init:
    # muP: sums over an n times wider input stay as large.
    return Init("normal", model.init_std / sqrt(model.width_ratio))


def _residual_init(model: ModelConfig) -> Init:
    # GPT-2: 2 x num_layers outputs are added to the residual stream; the scale keeps its
    # variance independent of depth. In CompleteP only the base model's depth counts here,
    # because `residual_factor` makes up for the rest.
    num_layers = model.num_layers / model.depth_ratio
    return Init("normal", _normal(model).std / sqrt(2 * num_layers))
