"""DeepSeek-V3.

Owns: its config.json and names: latent attention with rotated parts in pairs, a
balancing bias, shared experts, and layers that predict further tokens behind the last
one. Pure.
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
    write_sizes,
)
from megatron_ray.checkpoint.hf.families.experts import (
    expert_rules,
    layers_with_experts,
    mixture,
)
from megatron_ray.checkpoint.hf.families.family import Family
from megatron_ray.checkpoint.hf.families.rope import read_rope
from megatron_ray.checkpoint.hf.options import Options
from megatron_ray.checkpoint.hf.places import Rotary, Rule
from megatron_ray.config.latent import LatentAttentionConfig
from megatron_ray.config.model import ModelConfig

_BLOCK = "mtp.{}.block."
_LATENT_SIZES = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_FURTHER = {
    "embedding_norm": "enorm",
    "hidden_norm": "hnorm",
    "projection": "eh_proj",
    "final_norm": "shared_head.norm",
}
_EPS = 1e-6
_BEST_OF_A_GROUP = 2
"""Groups are ranked by the sum of this many scores."""


def _read(options: Options) -> dict[str, Any]:
    options.only("attention_bias", (False,), False)
    options.only("rope_interleave", (True,), True)
    options.only("norm_topk_prob", (True,), True)
    options.only("scoring_func", ("sigmoid",), "sigmoid")
    options.only("topk_method", ("noaux_tc",), "noaux_tc")
    options.only("moe_layer_freq", (1,), 1)
    # Norms of the latents have it built in, whatever the key says.
    options.only("rms_norm_eps", (_EPS,), _EPS)
    activation = SILU[options.only("hidden_act", SILU, "silu")]
    fields = {
        **read_sizes(options, eps=_EPS),
        **read_rope(options),
        "activation": activation,
    }
    if (
        options.get("num_key_value_heads", fields["num_attention_heads"])
        != fields["num_attention_heads"]
    ):
        raise options.refuse(
            "num_key_value_heads differs from num_attention_heads: latent attention has no "
            "query groups"
        )
    further = options.number("num_nextn_predict_layers", 0)
    return fields | {
        "mla": {
            # Missing is the default, null is no latent.
            "q_lora_rank": options.values.get("q_lora_rank", 1536),
            **{name: options.number(name, size) for name, size in _LATENT_SIZES.items()},
        },
        "moe": _read_moe(options, fields["num_layers"]),
        "mtp": {"num_layers": further} if further else None,
    }


def _read_moe(options: Options, num_layers: int) -> dict[str, Any]:
    dense = min(options.number("first_k_dense_replace", 3), num_layers)
    width = options.number("moe_intermediate_size", 2048)
    shared = options.number("n_shared_experts", 1)
    top_k, groups, of_groups = (
        options.number(key, default)
        for key, default in (("num_experts_per_tok", 8), ("n_group", 1), ("topk_group", 1))
    )
    limited = groups > 1 and of_groups < groups
    if limited and top_k // of_groups != _BEST_OF_A_GROUP:
        text = (
            f"num_experts_per_tok={top_k} with topk_group={of_groups} is not supported: groups "
            "are ranked by their best"
        )
        raise options.refuse(
            f"{text} {_BEST_OF_A_GROUP} scores there, by num_experts_per_tok / topk_group here"
        )
    return {
        "num_experts": options.number("n_routed_experts", 256),
        "top_k": top_k,
        "ffn_hidden_size": width,
        "layer_pattern": [0] * dense + [1] * (num_layers - dense),
        "score_function": "sigmoid",
        "expert_bias": True,
        "scaling_factor": options.number("routed_scaling_factor", 2.5),
        "num_groups": groups if limited else None,
        "group_top_k": of_groups if limited else None,
        "shared_expert_ffn_hidden_size": width * shared if shared else None,
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
        **{name: getattr(mla, name) for name in _LATENT_SIZES},
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": width,
        "n_shared_experts": (moe.shared_expert_ffn_hidden_size or 0) // width,
        "first_k_dense_replace": [*layers_with_experts(model), 1].index(1),
        "moe_layer_freq": 1,
        "n_group": moe.num_groups or 1,
        "topk_group": moe.group_top_k or 1,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "routed_scaling_factor": moe.scaling_factor,
        "num_nextn_predict_layers": model.mtp.num_layers if model.mtp is not None else 0,
    }


def latent(model: ModelConfig) -> LatentAttentionConfig:
    """The latent attention of a model that must have it. Raises ValueError."""
    if model.mla is None:
        raise ValueError("the model has no latent attention")
    return model.mla


def _rules(model: ModelConfig) -> list[Rule]:
    rules = frame_rules(model) + _layer_rules(model, LAYER, 0)
    if model.mtp is not None:
        first = model.num_layers
        rules += _layer_rules(model, _BLOCK, first)
        for ours, theirs in _FURTHER.items():
            rules.append(
                Rule(
                    f"mtp.{{}}.{ours}.weight",
                    f"{STORED_LAYER}{theirs}.weight",
                    first_layer=first,
                )
            )
    return rules


def _layer_rules(model: ModelConfig, logical: str, first: int) -> list[Rule]:
    rules = norm_rules(logical, STORED_LAYER, first) + expert_rules(
        logical, first_layer=first
    )
    gate = STORED_LAYER + "mlp.gate.e_score_correction_bias"
    rules.append(Rule(logical + "moe.expert_bias", gate, first_layer=first))
    for ours, theirs in MLP.items():
        for mine, place in {"mlp.": "mlp.", "moe.shared.": "mlp.shared_experts."}.items():
            rules.append(
                Rule(
                    f"{logical}{mine}{ours}.weight",
                    f"{STORED_LAYER}{place}{theirs}.weight",
                    first_layer=first,
                )
            )
    return rules + _attention_rules(latent(model), logical + "attention.", first)


def _attention_rules(mla: LatentAttentionConfig, logical: str, first: int) -> list[Rule]:
    stored = STORED_LAYER + "self_attn."
    of_query = Rotary(mla.qk_head_dim, mla.qk_nope_head_dim, mla.qk_rope_head_dim)
    of_key = Rotary(
        mla.kv_lora_rank + mla.qk_rope_head_dim, mla.kv_lora_rank, mla.qk_rope_head_dim
    )
    pairs: dict[str, tuple[str, Rotary | None]] = {
        "kv_down": ("kv_a_proj_with_mqa", of_key),
        "kv_norm": ("kv_a_layernorm", None),
        "kv_up": ("kv_b_proj", None),
        "o": ("o_proj", None),
    }
    if mla.q_lora_rank is None:
        pairs["q"] = ("q_proj", of_query)
    else:
        pairs |= {
            "q_down": ("q_a_proj", None),
            "q_norm": ("q_a_layernorm", None),
            "q_up": ("q_b_proj", of_query),
        }
    return [
        Rule(
            f"{logical}{ours}.weight",
            f"{stored}{theirs}.weight",
            rotary=rotary,
            first_layer=first,
        )
        for ours, (theirs, rotary) in pairs.items()
    ]


def _copies(model: ModelConfig) -> Mapping[str, str]:
    """Each further layer is published with embedding and head of its own, equal to the
    model's.
    """
    further = model.mtp.num_layers if model.mtp is not None else 0
    head = "model.embed_tokens.weight" if model.tie_embeddings else "lm_head.weight"
    found = {}
    for layer in range(model.num_layers, model.num_layers + further):
        found[f"model.layers.{layer}.embed_tokens.weight"] = "model.embed_tokens.weight"
        found[f"model.layers.{layer}.shared_head.head.weight"] = head
    return found


def _present(model: ModelConfig, names: Collection[str]) -> ModelConfig:
    """Transformers says in config.json that there are further layers, and does not save
    them.
    """
    further = any(name.startswith(f"model.layers.{model.num_layers}.") for name in names)
    return model if further else model.model_copy(update={"mtp": None})


DEEPSEEK_V3 = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    _read,
    _write,
    _rules,
    copies=_copies,
    present=_present,
)
