"""Reads and writes config fields and names that Llama-like families share.

Pure. Must not know: any family.
"""

from collections.abc import Mapping
from typing import Any

from megatron_ray.checkpoint.hf.families.rope import read_rope, write_rope
from megatron_ray.checkpoint.hf.hf_config import HfConfig
from megatron_ray.checkpoint.hf.tensor_locations import Rule, linear, linears
from megatron_ray.config.model import ModelConfig

LAYER = "layers.{}."
"""Prefix of a layer's logical names."""
STORED_LAYER = "model.layers.{}."
"""Prefix of a layer's stored names."""
SILU = {"silu": "swiglu", "swish": "swiglu"}
"""Values of hidden_act -> activation."""
MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
"""Logical -> stored names of the matrices of an MLP."""


def read_sizes(config: HfConfig, *, eps: float, tied: bool = False) -> dict[str, Any]:
    """Reads fields that all families with rotary positions and RMS norms have."""
    return {
        "num_layers": config.number("num_hidden_layers"),
        "hidden_size": config.number("hidden_size"),
        "num_attention_heads": config.number("num_attention_heads"),
        "ffn_hidden_size": config.number("intermediate_size"),
        "vocab_size": config.number("vocab_size"),
        "max_sequence_length": config.number("max_position_embeddings", 2048),
        "norm": "rmsnorm",
        "norm_eps": config.number("rms_norm_eps", eps),
        "position_embedding": "rope",
        "tie_embeddings": config.flag("tie_word_embeddings", tied),
        "init_std": config.number("initializer_range", 0.02),
        "attention_dropout": config.number("attention_dropout", 0.0),
    }


def read_decoder(
    config: HfConfig,
    *,
    eps: float = 1e-6,
    theta: float = 10000.0,
    head_dim: int | None = None,
    tied: bool = False,
) -> dict[str, Any]:
    """Reads all fields of a plain decoder with grouped-query attention.

    `eps`, `theta`, `head_dim` and `tied` are the family's defaults for missing keys.
    """
    return {
        **read_sizes(config, eps=eps, tied=tied),
        **read_rope(config, theta),
        "num_query_groups": config.get("num_key_value_heads"),
        "head_dim": config.get("head_dim", head_dim),
        "activation": SILU[config.one_of("hidden_act", SILU, "silu")],
    }


def read_attention_bias(config: HfConfig) -> dict[str, Any]:
    """Reads the key that stands for the biases of all projections of attention."""
    has_bias = config.flag("attention_bias", False)
    return {"qkv_bias": has_bias, "attention_output_bias": has_bias}


def write_attention_bias(model: ModelConfig) -> dict[str, Any]:
    """Writes the key that `read_attention_bias` reads."""
    return {"attention_bias": model.has_attention_output_bias}


def write_sizes(model: ModelConfig) -> dict[str, Any]:
    """Writes the fields that `read_sizes` and `read_rope` read."""
    return {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.kv_heads,
        "intermediate_size": model.ffn_width,
        "vocab_size": model.vocabulary,
        "max_position_embeddings": model.max_sequence_length,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        "attention_dropout": model.attention_dropout,
        "use_cache": True,  # transformers' default, for generation
        **write_rope(model),
    }


def write_decoder(model: ModelConfig) -> dict[str, Any]:
    """Writes the fields that `read_decoder` reads."""
    return {**write_sizes(model), "head_dim": model.head_width, "hidden_act": "silu"}


def read_windows(config: HfConfig, num_layers: int) -> dict[str, Any]:
    """Reads which layers have a sliding window, as Qwen's families write it.

    ModelConfig can exempt every n-th layer from the window, so other patterns are
    refused.
    """
    window = config.get("sliding_window")
    if not config.flag("use_sliding_window", False) or window is None:
        return {}
    is_full = _full_attention_layers(config, num_layers)
    # No layer, all layers, or every n-th layer without a window.
    if True not in is_full:
        return {"sliding_window": window}
    if False not in is_full:
        return {}
    every = is_full.index(True) + 1
    if is_full != [(layer + 1) % every == 0 for layer in range(num_layers)]:
        raise config.error(
            "layer_types (or max_window_layers) must give every n-th layer full attention, "
            "or no layer"
        )
    return {"sliding_window": window, "full_attention_every": every}


def _full_attention_layers(config: HfConfig, num_layers: int) -> list[bool]:
    """Returns whether each layer attends to all tokens."""
    layer_types = config.get("layer_types")
    if layer_types is not None:
        return [kind == "full_attention" for kind in layer_types]
    # The older key: layers from this index on have the window.
    first_with_window = config.number("max_window_layers", 28)
    return [layer < first_with_window for layer in range(num_layers)]


def write_windows(model: ModelConfig) -> dict[str, Any]:
    """Writes the fields that `read_windows` reads."""
    layer_types = []
    for layer in range(model.num_layers):
        kind = "sliding_attention"
        if model.window_on(layer) is None:
            kind = "full_attention"
        layer_types.append(kind)
    is_used = model.sliding_window is not None
    return {
        "use_sliding_window": is_used,
        "sliding_window": model.sliding_window,
        "max_window_layers": 0 if is_used else model.num_layers,
        "layer_types": layer_types,
    }


def frame_rules(model: ModelConfig) -> list[Rule]:
    """Returns the rules of embedding, last norm and head."""
    rules = linear("embedding", "model.embed_tokens") + linear("final_norm", "model.norm")
    if not model.tie_embeddings:
        rules += linear("head", "lm_head")
    return rules


def weight_rules(
    names: Mapping[str, str], logical: str, stored: str, first_layer: int = 0
) -> list[Rule]:
    """Returns the rules of weights that share two prefixes.

    `names` map the rest of a logical name to the rest of the stored name. `first_layer`
    is the stored number of logical layer 0.
    """
    rules = []
    for logical_name, stored_name in names.items():
        rules.append(
            Rule(
                f"{logical}{logical_name}.weight",
                f"{stored}{stored_name}.weight",
                first_layer=first_layer,
            )
        )
    return rules


def norm_rules(
    logical: str = LAYER, stored: str = STORED_LAYER, first_layer: int = 0
) -> list[Rule]:
    """Returns the rules of the two norms of a layer."""
    names = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    return weight_rules(names, logical, stored, first_layer)


def decoder_rules(model: ModelConfig) -> list[Rule]:
    """Returns the rules of a plain decoder, with biases and query/key norms if any."""
    attention = LAYER + "attention."
    stored = STORED_LAYER + "self_attn."
    rules = frame_rules(model) + norm_rules()
    for name in "qkv":
        rules += linear(attention + name, f"{stored}{name}_proj", bias=model.has_qkv_bias)
    rules += linear(
        attention + "o", stored + "o_proj", bias=model.has_attention_output_bias
    )
    if model.qk_norm:
        rules += linears({"q_norm": "q_norm", "k_norm": "k_norm"}, attention, stored)
    for logical_name, stored_name in MLP.items():
        logical = f"{LAYER}mlp.{logical_name}"
        stored_mlp = f"{STORED_LAYER}mlp.{stored_name}"
        rules += linear(logical, stored_mlp, bias=model.has_mlp_bias)
    return rules
