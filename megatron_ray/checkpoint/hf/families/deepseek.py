"""Describes DeepSeek-V3.

It has latent attention with rotated parts stored in pairs, a balancing bias, shared
experts, and multi-token prediction (MTP) layers, which are stored after the last layer.
Pure. Must not know: files, torch.
"""

from collections.abc import Collection, Mapping
from typing import Any

from megatron_ray.checkpoint.hf.families.decoder import (
    LAYER,
    MLP,
    SILU,
    STORED_LAYER,
    frame_rules,
    norm_rules,
    read_sizes,
    weight_rules,
    write_sizes,
)
from megatron_ray.checkpoint.hf.families.experts import (
    expert_rules,
    layers_with_experts,
    mixture,
)
from megatron_ray.checkpoint.hf.families.family import Family
from megatron_ray.checkpoint.hf.families.rope import read_rope
from megatron_ray.checkpoint.hf.hf_config import HfConfig
from megatron_ray.checkpoint.hf.tensor_locations import InterleavedRotary, Rule
from megatron_ray.config.latent import LatentAttentionConfig
from megatron_ray.config.model import ModelConfig

_MTP_BLOCK = "mtp.{}.block."
"""Prefix of the logical names of an MTP layer's transformer block."""
_LATENT_SIZES = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_MTP_WEIGHTS = {
    "embedding_norm": "enorm",
    "hidden_norm": "hnorm",
    "projection": "eh_proj",
    "final_norm": "shared_head.norm",
}
"""Weights of an MTP layer outside its block."""
_FFNS = {"mlp.": "mlp.", "moe.shared.": "mlp.shared_experts."}
_EPS = 1e-6
_SCORES_PER_GROUP = 2
"""Number of best scores whose sum ranks a group of experts."""


def _read(config: HfConfig) -> dict[str, Any]:
    # Variants that ModelConfig does not support must be switched off.
    config.one_of("attention_bias", (False,), False)
    config.one_of("rope_interleave", (True,), True)
    config.one_of("norm_topk_prob", (True,), True)
    config.one_of("scoring_func", ("sigmoid",), "sigmoid")
    config.one_of("topk_method", ("noaux_tc",), "noaux_tc")
    config.one_of("moe_layer_freq", (1,), 1)
    # transformers ignores the key for the norms of latents and always uses this value.
    config.one_of("rms_norm_eps", (_EPS,), _EPS)
    activation = SILU[config.one_of("hidden_act", SILU, "silu")]
    fields = {
        **read_sizes(config, eps=_EPS),
        **read_rope(config),
        "activation": activation,
    }
    num_heads = fields["num_attention_heads"]
    if config.get("num_key_value_heads", num_heads) != num_heads:
        raise config.error(
            "num_key_value_heads differs from num_attention_heads: latent attention has no "
            "query groups"
        )
    # A missing key means the default rank, null means no query latent.
    mla = {"q_lora_rank": config.values.get("q_lora_rank", 1536)}
    for name, size in _LATENT_SIZES.items():
        mla[name] = config.number(name, size)
    fields |= {"mla": mla, "moe": _read_moe(config, fields["num_layers"]), "mtp": None}
    num_mtp_layers = config.number("num_nextn_predict_layers", 0)
    if num_mtp_layers:
        fields["mtp"] = {"num_layers": num_mtp_layers}
    return fields


def _read_moe(config: HfConfig, num_layers: int) -> dict[str, Any]:
    dense = min(config.number("first_k_dense_replace", 3), num_layers)
    width = config.number("moe_intermediate_size", 2048)
    # 0 shared experts become null.
    shared_width = width * config.number("n_shared_experts", 1) or None
    top_k = config.number("num_experts_per_tok", 8)
    groups = config.number("n_group", 1)
    group_top_k = config.number("topk_group", 1)
    # Routing is not group-limited with one group, or with a choice among all groups.
    is_limited = groups > 1 and group_top_k < groups
    if is_limited and top_k // group_top_k != _SCORES_PER_GROUP:
        raise config.error(
            f"num_experts_per_tok={top_k} with topk_group={group_top_k} is not supported: "
            f"groups are ranked by their best {_SCORES_PER_GROUP} scores there, by "
            "num_experts_per_tok / topk_group here"
        )
    return {
        "num_experts": config.number("n_routed_experts", 256),
        "top_k": top_k,
        "ffn_hidden_size": width,
        "layer_pattern": [0] * dense + [1] * (num_layers - dense),
        "score_function": "sigmoid",
        "expert_bias": True,
        "scaling_factor": config.number("routed_scaling_factor", 2.5),
        "num_groups": groups if is_limited else None,
        "group_top_k": group_top_k if is_limited else None,
        "shared_expert_ffn_hidden_size": shared_width,
    }


def _write(model: ModelConfig) -> dict[str, Any]:
    moe = mixture(model)
    mla = latent(model)
    width = model.expert_width
    return write_sizes(model) | {
        "num_key_value_heads": model.num_attention_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_interleave": True,
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
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "routed_scaling_factor": moe.scaling_factor,
        "num_nextn_predict_layers": model.num_mtp_layers,
    }


def latent(model: ModelConfig) -> LatentAttentionConfig:
    """Returns the latent attention of a model; raises ValueError when it has none."""
    if model.mla is None:
        raise ValueError("the model has no latent attention")
    return model.mla


def _rules(model: ModelConfig) -> list[Rule]:
    rules = frame_rules(model) + _layer_rules(model, LAYER, 0)
    if model.mtp is not None:
        first = model.num_layers
        rules += _layer_rules(model, _MTP_BLOCK, first)
        rules += weight_rules(_MTP_WEIGHTS, "mtp.{}.", STORED_LAYER, first)
    return rules


def _layer_rules(model: ModelConfig, logical: str, first: int) -> list[Rule]:
    """Returns the rules of a layer with an MLP or experts; a layer has one of both."""
    rules = norm_rules(logical, STORED_LAYER, first)
    rules += expert_rules(logical, first_layer=first)
    bias = STORED_LAYER + "mlp.gate.e_score_correction_bias"
    rules.append(Rule(logical + "moe.expert_bias", bias, first_layer=first))
    for logical_name, stored_name in _FFNS.items():
        rules += weight_rules(
            MLP, logical + logical_name, STORED_LAYER + stored_name, first
        )
    return rules + _attention_rules(latent(model), logical + "attention.", first)


def _attention_rules(mla: LatentAttentionConfig, logical: str, first: int) -> list[Rule]:
    stored = STORED_LAYER + "self_attn."
    # The rotated part comes last in each query head, and last in the rows that project to
    # the key-value latent.
    query_order = InterleavedRotary(
        mla.qk_head_dim, mla.qk_nope_head_dim, mla.qk_rope_head_dim
    )
    key_order = InterleavedRotary(
        mla.kv_lora_rank + mla.qk_rope_head_dim, mla.kv_lora_rank, mla.qk_rope_head_dim
    )
    names: dict[str, tuple[str, InterleavedRotary | None]] = {
        "kv_down": ("kv_a_proj_with_mqa", key_order),
        "kv_norm": ("kv_a_layernorm", None),
        "kv_up": ("kv_b_proj", None),
        "o": ("o_proj", None),
    }
    if mla.q_lora_rank is None:
        names["q"] = ("q_proj", query_order)
    else:
        names |= {
            "q_down": ("q_a_proj", None),
            "q_norm": ("q_a_layernorm", None),
            "q_up": ("q_b_proj", query_order),
        }
    rules = []
    for logical_name, (stored_name, rotary) in names.items():
        rules.append(
            Rule(
                f"{logical}{logical_name}.weight",
                f"{stored}{stored_name}.weight",
                rotary=rotary,
                first_layer=first,
            )
        )
    return rules


def _copies(model: ModelConfig) -> Mapping[str, str]:
    """Returns the copies of embeddings and heads in the MTP layers of published files."""
    embedding = "model.embed_tokens.weight"
    head = embedding if model.tie_embeddings else "lm_head.weight"
    copies = {}
    for layer in range(model.num_layers, model.num_layers + model.num_mtp_layers):
        copies[f"model.layers.{layer}.embed_tokens.weight"] = embedding
        copies[f"model.layers.{layer}.shared_head.head.weight"] = head
    return copies


def _present(model: ModelConfig, names: Collection[str]) -> ModelConfig:
    """Returns the model without MTP layers where they are not stored.

    Transformers lists them in config.json but does not save them.
    """
    prefix = f"model.layers.{model.num_layers}."
    if any(name.startswith(prefix) for name in names):
        return model
    return model.model_copy(update={"mtp": None})


DEEPSEEK_V3 = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    _read,
    _write,
    _rules,
    copies=_copies,
    present=_present,
)
