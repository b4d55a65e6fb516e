"""Describes DeepSeek-V2 and DeepSeek-V3.

DeepSeek-V3 has a balancing bias and multi-token prediction (MTP) layers, which are
stored after the last layer. Pure. Must not know: files, torch.
"""

from collections.abc import Collection, Mapping
from typing import Any

from megatron_ray.checkpoint.hf.families.decoder import (
    LAYER,
    STORED_LAYER,
    frame_rules,
    weight_rules,
)
from megatron_ray.checkpoint.hf.families.experts import mixture, stacked_expert_rules
from megatron_ray.checkpoint.hf.families.family import Family
from megatron_ray.checkpoint.hf.families.latent_attention import (
    latent_layer_rules,
    read_experts,
    read_groups,
    read_latent_decoder,
    write_latent_decoder,
)
from megatron_ray.checkpoint.hf.hf_config import HfConfig
from megatron_ray.checkpoint.hf.tensor_locations import Rule
from megatron_ray.config.model import ModelConfig

_MTP_BLOCK = "mtp.{}.block."
"""Prefix of the logical names of an MTP layer's transformer block."""
_MTP_WEIGHTS = {
    "embedding_norm": "enorm",
    "hidden_norm": "hnorm",
    "projection": "eh_proj",
    "final_norm": "shared_head.norm",
}
"""Weights of an MTP layer outside its block."""
_BIAS = "mlp.gate.e_score_correction_bias"
_V2_SCORES = 1
_V3_SCORES = 2
"""Number of best scores whose sum ranks a group of experts."""
_GREEDY = ("greedy", "gready")
"""Two spellings of published files."""
_GROUPS = "group_limited_greedy"


def _read_v2(config: HfConfig) -> dict[str, Any]:
    # Smaller relatives, in documents' readers, have ordinary attention.
    config.one_of("use_mla", (True,), True)
    # Transformers ignores norm_topk_prob, the published code does not.
    config.one_of("norm_topk_prob", (False,), False)
    config.one_of("scoring_func", ("softmax",), "softmax")
    method = config.one_of("topk_method", (*_GREEDY, _GROUPS), _GREEDY[0])
    fields = read_latent_decoder(config)
    num_layers = fields["num_layers"]
    top_k = config.number("num_experts_per_tok")
    moe = read_experts(config, num_layers, dense_layers=0, width=1407, shared=2) | {
        "num_experts": config.number("n_routed_experts", 64),
        "top_k": top_k,
        "pre_softmax": True,
        "scaling_factor": config.number("routed_scaling_factor", 1.0),
    }
    if method == _GROUPS:
        moe |= read_groups(config, top_k, _V2_SCORES)
    return fields | {"moe": moe, "mlp_bias": config.flag("mlp_bias", False)}


def _write_v2(model: ModelConfig) -> dict[str, Any]:
    is_limited = mixture(model).num_groups is not None
    return write_latent_decoder(model, _V2_SCORES) | {
        "mlp_bias": model.has_mlp_bias,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "topk_method": _GROUPS if is_limited else _GREEDY[0],
    }


def _v2_rules(model: ModelConfig) -> list[Rule]:
    return frame_rules(model) + latent_layer_rules(model)


def _read_v3(config: HfConfig) -> dict[str, Any]:
    # Variants that ModelConfig does not support must be switched off.
    config.one_of("rope_interleave", (True,), True)
    config.one_of("norm_topk_prob", (True,), True)
    config.one_of("scoring_func", ("sigmoid",), "sigmoid")
    config.one_of("topk_method", ("noaux_tc",), "noaux_tc")
    fields = read_latent_decoder(config)
    num_layers = fields["num_layers"]
    top_k = config.number("num_experts_per_tok", 8)
    moe = read_experts(config, num_layers, dense_layers=3, width=2048, shared=1) | {
        "num_experts": config.number("n_routed_experts", 256),
        "top_k": top_k,
        "score_function": "sigmoid",
        "expert_bias": True,
        "scaling_factor": config.number("routed_scaling_factor", 2.5),
        **read_groups(config, top_k, _V3_SCORES),
    }
    fields |= {"moe": moe, "mtp": None}
    num_mtp_layers = config.number("num_nextn_predict_layers", 0)
    if num_mtp_layers:
        fields["mtp"] = {"num_layers": num_mtp_layers}
    return fields


def _write_v3(model: ModelConfig) -> dict[str, Any]:
    return write_latent_decoder(model, _V3_SCORES) | {
        "rope_interleave": True,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": model.num_mtp_layers,
    }


def _v3_rules(model: ModelConfig) -> list[Rule]:
    rules = frame_rules(model) + _v3_layer_rules(model, LAYER, 0)
    if model.mtp is not None:
        first = model.num_layers
        rules += _v3_layer_rules(model, _MTP_BLOCK, first)
        rules += weight_rules(_MTP_WEIGHTS, "mtp.{}.", STORED_LAYER, first)
    return rules


def _v3_layer_rules(model: ModelConfig, logical: str, first: int) -> list[Rule]:
    bias = Rule(logical + "moe.expert_bias", STORED_LAYER + _BIAS, first_layer=first)
    return [*latent_layer_rules(model, logical, first), bias]


def _v2_other_layouts(model: ModelConfig) -> list[list[Rule]]:
    return [stacked_expert_rules(model)]


def _v3_other_layouts(model: ModelConfig) -> list[list[Rule]]:
    rules = stacked_expert_rules(model)
    if model.mtp is not None:
        rules += stacked_expert_rules(model, _MTP_BLOCK, first_layer=model.num_layers)
    return [rules]


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


DEEPSEEK_V2 = Family(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    _read_v2,
    _write_v2,
    _v2_rules,
    other_layouts=_v2_other_layouts,
)
DEEPSEEK_V3 = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    _read_v3,
    _write_v3,
    _v3_rules,
    other_layouts=_v3_other_layouts,
    copies=_copies,
    present=_present,
)
