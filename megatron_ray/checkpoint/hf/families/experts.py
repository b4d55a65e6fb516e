"""Mixtral and Qwen3-MoE. Owns: what tells them apart.

Published files have a tensor per expert and matrix. Pure.
"""

from typing import Any

from megatron_ray.checkpoint.hf.families.decoder import (
    LAYER,
    MLP,
    STORED_LAYER,
    decoder_rules,
    read_decoder,
    read_windows,
    write_decoder,
    write_windows,
)
from megatron_ray.checkpoint.hf.families.family import Family
from megatron_ray.checkpoint.hf.options import Options
from megatron_ray.checkpoint.hf.places import Rule, linear, linears
from megatron_ray.config.model import ModelConfig
from megatron_ray.config.moe import MoEConfig

_EXPERTS = LAYER + "moe.experts.{}."


def mixture(model: ModelConfig) -> MoEConfig:
    """The mixture of a model that must have one. Raises ValueError."""
    if model.moe is None:
        raise ValueError("the model has no experts")
    return model.moe


def layers_with_experts(model: ModelConfig) -> list[int]:
    """1 or 0 for each layer."""
    return [int(model.experts_on(layer) is not None) for layer in range(model.num_layers)]


def _read_mixtral(options: Options) -> dict[str, Any]:
    fields = read_decoder(options, eps=1e-5, theta=1e6)
    moe = {
        "num_experts": options.number("num_local_experts", 8),
        "top_k": options.number("num_experts_per_tok", 2),
    }
    own = {"moe": moe, "sliding_window": options.get("sliding_window")}
    return fields | own | {"num_query_groups": options.get("num_key_value_heads", 8)}


def _write_mixtral(model: ModelConfig) -> dict[str, Any]:
    moe = mixture(model)
    own = {
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "sliding_window": model.sliding_window,
    }
    return write_decoder(model) | own | {"intermediate_size": model.expert_width}


def _mixtral_rules(model: ModelConfig) -> list[Rule]:
    stored = STORED_LAYER + "block_sparse_moe."
    rules = linear(LAYER + "moe.router", stored + "gate")
    return (
        decoder_rules(model)
        + rules
        + linears(
            {"gate": "w1", "up": "w3", "down": "w2"}, _EXPERTS, stored + "experts.{}."
        )
    )


def _read_qwen3_moe(options: Options) -> dict[str, Any]:
    options.only("attention_bias", (False,), False)
    fields = read_decoder(options)
    every = options.number("decoder_sparse_step", 1)
    without = options.get("mlp_only_layers", [])
    layers = range(fields["num_layers"])
    moe = {
        "num_experts": options.number(
            "num_experts", options.number("num_local_experts", 128)
        ),
        "top_k": options.number("num_experts_per_tok", 8),
        "ffn_hidden_size": options.number("moe_intermediate_size", 768),
        "pre_softmax": not options.flag("norm_topk_prob", False),
        "layer_pattern": [
            int((layer + 1) % every == 0 and layer not in without) for layer in layers
        ],
    }
    windows = read_windows(
        Options({"max_window_layers": 0, **options.values}, options.where),
        fields["num_layers"],
    )
    return (
        fields
        | windows
        | {
            "qk_norm": True,
            "moe": moe,
            "num_query_groups": options.get("num_key_value_heads", 4),
        }
    )


def _write_qwen3_moe(model: ModelConfig) -> dict[str, Any]:
    moe = mixture(model)
    own = {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": model.expert_width,
        "norm_topk_prob": not moe.pre_softmax,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [
            layer for layer, has in enumerate(layers_with_experts(model)) if not has
        ],
        "attention_bias": False,
    }
    return write_decoder(model) | write_windows(model) | own


def expert_rules(
    logical: str = LAYER, stored: str = STORED_LAYER + "mlp.", first_layer: int = 0
) -> list[Rule]:
    """Router and experts as Qwen and DeepSeek name them."""
    pairs = {"router": "gate"} | {
        f"experts.{{}}.{ours}": f"experts.{{}}.{theirs}" for ours, theirs in MLP.items()
    }
    return [
        Rule(
            f"{logical}moe.{ours}.weight",
            f"{stored}{theirs}.weight",
            first_layer=first_layer,
        )
        for ours, theirs in pairs.items()
    ]


def _qwen3_moe_rules(model: ModelConfig) -> list[Rule]:
    return decoder_rules(model) + expert_rules()


MIXTRAL = Family(
    "mixtral", "MixtralForCausalLM", _read_mixtral, _write_mixtral, _mixtral_rules
)
QWEN3_MOE = Family(
    "qwen3_moe", "Qwen3MoeForCausalLM", _read_qwen3_moe, _write_qwen3_moe, _qwen3_moe_rules
)
