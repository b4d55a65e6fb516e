"""Describes Mixtral and Qwen3-MoE.

Published files have a tensor per expert and matrix; transformers has the matrices of
all experts of a layer in one tensor, and reads and writes files of both layouts.

Pure. Must not know: files, torch.
"""

from typing import Any

from megatron_ray.checkpoint.hf.families.decoder import (
    LAYER,
    MLP,
    STORED_LAYER,
    decoder_rules,
    read_attention_bias,
    read_decoder,
    read_windows,
    weight_rules,
    write_attention_bias,
    write_decoder,
    write_windows,
)
from megatron_ray.checkpoint.hf.families.family import Family, UnsupportedFieldError
from megatron_ray.checkpoint.hf.hf_config import HfConfig
from megatron_ray.checkpoint.hf.tensor_locations import Rule, linear, linears
from megatron_ray.config.architecture.moe import MoEConfig
from megatron_ray.config.model import ModelConfig

_EXPERTS = LAYER + "moe.experts.{}."
_STORED_MOE = STORED_LAYER + "mlp."
_MIXTRAL_MOE = STORED_LAYER + "block_sparse_moe."


def mixture(model: ModelConfig) -> MoEConfig:
    """Returns the mixture of a model; raises UnsupportedFieldError when it has none."""
    if model.moe is None:
        raise UnsupportedFieldError("moe", " is null, and every such model has experts")
    return model.moe


def layers_with_experts(model: ModelConfig) -> list[int]:
    """Returns 1 for each layer with experts and 0 for each without."""
    return [int(model.experts_on(layer) is not None) for layer in range(model.num_layers)]


def _read_mixtral(config: HfConfig) -> dict[str, Any]:
    fields = read_decoder(config, eps=1e-5, theta=1e6)
    moe = {
        "num_experts": config.number("num_local_experts", 8),
        "top_k": config.number("num_experts_per_tok", 2),
    }
    return fields | {
        "moe": moe,
        "sliding_window": config.get("sliding_window"),
        "num_query_groups": config.get("num_key_value_heads", 8),
    }


def _write_mixtral(model: ModelConfig) -> dict[str, Any]:
    moe = mixture(model)
    return write_decoder(model) | {
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "sliding_window": model.sliding_window,
        "intermediate_size": model.expert_width,
    }


def _mixtral_rules(model: ModelConfig) -> list[Rule]:
    return decoder_rules(model) + _numbered_matrices(_MIXTRAL_MOE)


def _numbered_matrices(stored: str) -> list[Rule]:
    # Mixtral numbers its matrices; w1 and w3 are the two inputs of the gated MLP.
    matrices = {"gate": "w1", "up": "w3", "down": "w2"}
    return [
        *linear(LAYER + "moe.router", stored + "gate"),
        *linears(matrices, _EXPERTS, stored + "experts.{}."),
    ]


def _other_mixtral_layouts(model: ModelConfig) -> list[list[Rule]]:
    # The module has another name in transformers than in published files.
    return [
        _numbered_matrices(_STORED_MOE),
        stacked_expert_rules(model),
        stacked_expert_rules(model, stored=_MIXTRAL_MOE),
    ]


def _read_qwen3_moe(config: HfConfig) -> dict[str, Any]:
    fields = read_decoder(config) | read_attention_bias(config)
    num_layers = fields["num_layers"]
    every = config.number("decoder_sparse_step", 1)
    dense_layers = config.get("mlp_only_layers", [])
    layer_pattern = []
    for layer in range(num_layers):
        is_sparse = (layer + 1) % every == 0 and layer not in dense_layers
        layer_pattern.append(int(is_sparse))
    # Newer versions of transformers write the second key.
    num_experts = config.number("num_experts", config.number("num_local_experts", 128))
    moe = {
        "num_experts": num_experts,
        "top_k": config.number("num_experts_per_tok", 8),
        "ffn_hidden_size": config.number("moe_intermediate_size", 768),
        # Softmax over the chosen experts equals softmax over all and normalizing after it.
        "pre_softmax": not config.flag("norm_topk_prob", False),
        "layer_pattern": layer_pattern,
    }
    fields |= {
        "qk_norm": True,
        "moe": moe,
        "num_query_groups": config.get("num_key_value_heads", 4),
    }
    # Unlike Qwen2 and Qwen3, all layers have the window by default.
    with_default = HfConfig({"max_window_layers": 0, **config.values}, config.where)
    return fields | read_windows(with_default, num_layers)


def _write_qwen3_moe(model: ModelConfig) -> dict[str, Any]:
    moe = mixture(model)
    dense_layers = []
    for layer, has_experts in enumerate(layers_with_experts(model)):
        if not has_experts:
            dense_layers.append(layer)
    values = {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": model.expert_width,
        "norm_topk_prob": not moe.pre_softmax,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense_layers,
    }
    return {
        **write_decoder(model),
        **write_windows(model),
        **write_attention_bias(model),
        **values,
    }


def expert_rules(
    logical: str = LAYER, stored: str = _STORED_MOE, first_layer: int = 0
) -> list[Rule]:
    """Returns the rules of router and experts, as Qwen and DeepSeek name them."""
    names = {"router": "gate"}
    for logical_name, stored_name in MLP.items():
        names[f"experts.{{}}.{logical_name}"] = f"experts.{{}}.{stored_name}"
    return weight_rules(names, f"{logical}moe.", stored, first_layer)


def stacked_expert_rules(
    model: ModelConfig,
    logical: str = LAYER,
    stored: str = _STORED_MOE,
    first_layer: int = 0,
) -> list[Rule]:
    """Returns the rules of experts in two tensors per layer, as transformers has them.

    Of each expert the first has the rows of the gate and then those of `up`.
    """
    stacked = stored + "experts."
    # Stored name, part, parts.
    places = {
        "gate": ("gate_up_proj", 0, 2),
        "up": ("gate_up_proj", 1, 2),
        "down": ("down_proj", 0, 1),
    }
    rules = weight_rules({"router": "gate"}, f"{logical}moe.", stored, first_layer)
    for name, (stored_name, part, parts) in places.items():
        rules.append(
            Rule(
                f"{logical}moe.experts.{{}}.{name}.weight",
                stacked + stored_name,
                part,
                parts,
                first_layer=first_layer,
                num_experts=mixture(model).num_experts,
            )
        )
    return rules


def _qwen3_moe_rules(model: ModelConfig) -> list[Rule]:
    return decoder_rules(model) + expert_rules()


def _other_qwen3_moe_layouts(model: ModelConfig) -> list[list[Rule]]:
    return [stacked_expert_rules(model)]


MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    _read_mixtral,
    _write_mixtral,
    _mixtral_rules,
    other_layouts=_other_mixtral_layouts,
)
QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    _read_qwen3_moe,
    _write_qwen3_moe,
    _qwen3_moe_rules,
    other_layouts=_other_qwen3_moe_layouts,
)
