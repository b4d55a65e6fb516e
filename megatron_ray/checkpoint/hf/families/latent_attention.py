"""Reads and writes what DeepSeek's families share: latent attention and shared experts.

Rotated parts are stored in pairs. Pure. Must not know: any family.
"""

from typing import Any

from megatron_ray.checkpoint.hf.families.decoder import (
    LAYER,
    MLP,
    SILU,
    STORED_LAYER,
    norm_rules,
    read_attention_bias,
    read_sizes,
    write_attention_bias,
    write_sizes,
)
from megatron_ray.checkpoint.hf.families.experts import (
    expert_rules,
    layers_with_experts,
    mixture,
)
from megatron_ray.checkpoint.hf.families.family import UnsupportedFieldError
from megatron_ray.checkpoint.hf.families.rope import read_rope
from megatron_ray.checkpoint.hf.hf_config import HfConfig
from megatron_ray.checkpoint.hf.tensor_locations import InterleavedRotary, Rule, linear
from megatron_ray.config.architecture.latent import LatentAttentionConfig
from megatron_ray.config.model import ModelConfig

_LATENT_SIZES = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_FFNS = {"mlp.": "mlp.", "moe.shared.": "mlp.shared_experts."}


def latent(model: ModelConfig) -> LatentAttentionConfig:
    """Returns the latent attention of a model.

    Raises UnsupportedFieldError when it has none.
    """
    if model.mla is None:
        detail = " is null, and every such model has latent attention"
        raise UnsupportedFieldError("mla", detail)
    return model.mla


def read_latent_decoder(config: HfConfig) -> dict[str, Any]:
    """Reads the fields of a decoder with latent attention, except its experts."""
    # Variants that ModelConfig does not support must be switched off.
    config.one_of("moe_layer_freq", (1,), 1)
    activation = SILU[config.one_of("hidden_act", SILU, "silu")]
    fields = {
        **read_sizes(config, eps=1e-6),
        **read_rope(config),
        **read_attention_bias(config),
        "activation": activation,
    }
    num_heads = fields["num_attention_heads"]
    if config.get("num_key_value_heads", num_heads) != num_heads:
        raise config.error(
            "num_key_value_heads differs from num_attention_heads: latent attention has no "
            "query groups"
        )
    # A missing key means the default rank, null means no query latent. Transformers has no
    # key for the eps of the latents' norms: it is always the default of ModelConfig.
    mla = {"q_lora_rank": config.values.get("q_lora_rank", 1536)}
    for name, size in _LATENT_SIZES.items():
        mla[name] = config.number(name, size)
    return fields | {"mla": mla}


def read_experts(
    config: HfConfig, num_layers: int, *, dense_layers: int, width: int, shared: int
) -> dict[str, Any]:
    """Reads the sizes of the experts; the other arguments are the family's defaults."""
    dense = min(config.number("first_k_dense_replace", dense_layers), num_layers)
    expert_width = config.number("moe_intermediate_size", width)
    return {
        "ffn_hidden_size": expert_width,
        "layer_pattern": [0] * dense + [1] * (num_layers - dense),
        # 0 shared experts become null.
        "shared_expert_ffn_hidden_size": (
            expert_width * config.number("n_shared_experts", shared) or None
        ),
    }


def read_groups(config: HfConfig, top_k: int, num_scores: int) -> dict[str, Any]:
    """Reads group-limited routing whose groups are ranked by `num_scores` scores each."""
    groups = config.number("n_group", 1)
    group_top_k = config.number("topk_group", 1)
    # Routing is not limited with one group, or with a choice among all groups.
    if groups <= 1 or group_top_k >= groups:
        return {}
    fields = {"num_groups": groups, "group_top_k": group_top_k}
    # The default of ModelConfig is left out where it is the same.
    if top_k % group_top_k or top_k // group_top_k != num_scores:
        fields["scores_per_group"] = num_scores
    return fields


def write_latent_decoder(model: ModelConfig, num_scores: int) -> dict[str, Any]:
    """Writes the fields that the functions above read.

    Raises UnsupportedFieldError when the groups of experts are not ranked by `num_scores` scores.
    """
    moe = mixture(model)
    mla = latent(model)
    if moe.num_groups is not None and moe.group_score_count != num_scores:
        detail = f"={moe.group_score_count} is not the {num_scores} of every such model"
        raise UnsupportedFieldError("moe.scores_per_group", detail)
    width = model.expert_width
    return {
        **write_sizes(model),
        **write_attention_bias(model),
        "num_key_value_heads": model.num_attention_heads,
        "hidden_act": "silu",
        "q_lora_rank": mla.q_lora_rank,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_nope_head_dim": mla.qk_nope_head_dim,
        "qk_rope_head_dim": mla.qk_rope_head_dim,
        "v_head_dim": mla.v_head_dim,
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": width,
        # Shared experts are written as a multiple of the routed experts' width.
        "n_shared_experts": (moe.shared_expert_ffn_hidden_size or 0) // width,
        # The number of layers before the first with experts.
        "first_k_dense_replace": [*layers_with_experts(model), 1].index(1),
        "moe_layer_freq": 1,
        "n_group": moe.num_groups or 1,
        "topk_group": moe.group_top_k or 1,
        "routed_scaling_factor": moe.scaling_factor,
    }


def latent_layer_rules(
    model: ModelConfig, logical: str = LAYER, first_layer: int = 0
) -> list[Rule]:
    """Returns the rules of a layer with an MLP or experts; a layer has one of both.

    `first_layer` is the stored number of logical layer 0.
    """
    rules = norm_rules(logical, STORED_LAYER, first_layer)
    rules += expert_rules(logical, first_layer=first_layer)
    for logical_ffn, stored_ffn in _FFNS.items():
        for logical_name, stored_name in MLP.items():
            rules += linear(
                f"{logical}{logical_ffn}{logical_name}",
                f"{STORED_LAYER}{stored_ffn}{stored_name}",
                bias=model.has_mlp_bias,
                first_layer=first_layer,
            )
    return rules + _attention_rules(model, logical + "attention.", first_layer)


def _attention_rules(model: ModelConfig, logical: str, first_layer: int) -> list[Rule]:
    mla = latent(model)
    # The rotated part comes last in each query head, and last in the rows that project to
    # the key-value latent.
    query_order = InterleavedRotary(
        mla.qk_head_dim, mla.qk_nope_head_dim, mla.qk_rope_head_dim
    )
    key_order = InterleavedRotary(
        mla.kv_lora_rank + mla.qk_rope_head_dim, mla.kv_lora_rank, mla.qk_rope_head_dim
    )
    to_latent = model.has_qkv_bias
    # Stored name, order of rows, bias.
    names: dict[str, tuple[str, InterleavedRotary | None, bool]] = {
        "kv_down": ("kv_a_proj_with_mqa", key_order, to_latent),
        "kv_norm": ("kv_a_layernorm", None, False),
        "kv_up": ("kv_b_proj", None, False),
        "o": ("o_proj", None, model.has_attention_output_bias),
    }
    if mla.q_lora_rank is None:
        names["q"] = ("q_proj", query_order, False)
    else:
        names |= {
            "q_down": ("q_a_proj", None, to_latent),
            "q_norm": ("q_a_layernorm", None, False),
            "q_up": ("q_b_proj", query_order, False),
        }
    rules = []
    for logical_name, (stored_name, rotary, bias) in names.items():
        rules += linear(
            logical + logical_name,
            f"{STORED_LAYER}self_attn.{stored_name}",
            bias=bias,
            rotary=rotary,
            first_layer=first_layer,
        )
    return rules
