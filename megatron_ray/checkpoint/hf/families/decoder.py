"""What Llama and its relatives have in common in config.json and in names.

Owns: that. Pure. Must not know: which family asks.
"""

from typing import Any

from megatron_ray.checkpoint.hf.families.rope import read_rope, write_rope
from megatron_ray.checkpoint.hf.options import Options
from megatron_ray.checkpoint.hf.places import Rule, linear, linears
from megatron_ray.config.model import ModelConfig

LAYER = "layers.{}."
STORED_LAYER = "model.layers.{}."
SILU = {"silu": "swiglu", "swish": "swiglu"}
MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def read_sizes(options: Options, *, eps: float, tied: bool = False) -> dict[str, Any]:
    """Fields that every family with rotary positions and RMS norms spells alike."""
    return {
        "num_layers": options.number("num_hidden_layers"),
        "hidden_size": options.number("hidden_size"),
        "num_attention_heads": options.number("num_attention_heads"),
        "ffn_hidden_size": options.number("intermediate_size"),
        "vocab_size": options.number("vocab_size"),
        "max_sequence_length": options.number("max_position_embeddings", 2048),
        "norm": "rmsnorm",
        "norm_eps": options.number("rms_norm_eps", eps),
        "position_embedding": "rope",
        "tie_embeddings": options.flag("tie_word_embeddings", tied),
        "init_std": options.number("initializer_range", 0.02),
        "attention_dropout": options.number("attention_dropout", 0.0),
    }


def read_decoder(
    options: Options,
    *,
    eps: float = 1e-6,
    theta: float = 10000.0,
    head_dim: int | None = None,
    tied: bool = False,
) -> dict[str, Any]:
    """All fields of a plain decoder with grouped-query attention; defaults are the
    family's own.
    """
    return {
        **read_sizes(options, eps=eps, tied=tied),
        **read_rope(options, theta),
        "num_query_groups": options.get("num_key_value_heads"),
        "head_dim": options.get("head_dim", head_dim),
        "activation": SILU[options.only("hidden_act", SILU, "silu")],
    }


def write_sizes(model: ModelConfig) -> dict[str, Any]:
    """The opposite of `read_sizes`, and the rotary positions."""
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
        "use_cache": True,
        **write_rope(model),
    }


def write_decoder(model: ModelConfig) -> dict[str, Any]:
    """The opposite of `read_decoder`."""
    return {**write_sizes(model), "head_dim": model.head_width, "hidden_act": "silu"}


def read_windows(options: Options, num_layers: int) -> dict[str, Any]:
    """Qwen's way to say which layers have a sliding window."""
    window = (
        options.get("sliding_window") if options.flag("use_sliding_window", False) else None
    )
    if window is None:
        return {}
    from_layer = options.number("max_window_layers", 28)
    default = [
        "full_attention" if layer < from_layer else "sliding_attention"
        for layer in range(num_layers)
    ]
    full = [kind == "full_attention" for kind in options.get("layer_types", default)]
    if not any(full):
        return {"sliding_window": window}
    every = full.index(True) + 1
    if every == 1 and all(full):
        return {}
    if full != [(layer + 1) % every == 0 for layer in range(num_layers)]:
        raise options.refuse(
            "layer_types (or max_window_layers) must give every n-th layer full attention, "
            "or no layer"
        )
    return {"sliding_window": window, "full_attention_every": every}


def write_windows(model: ModelConfig) -> dict[str, Any]:
    """The opposite of `read_windows`."""
    windows = [model.window_on(layer) for layer in range(model.num_layers)]
    used = model.sliding_window is not None
    return {
        "use_sliding_window": used,
        "sliding_window": model.sliding_window,
        "max_window_layers": 0 if used else model.num_layers,
        "layer_types": [
            "full_attention" if window is None else "sliding_attention"
            for window in windows
        ],
    }


def frame_rules(model: ModelConfig) -> list[Rule]:
    """Embedding, last norm and head."""
    rules = linear("embedding", "model.embed_tokens") + linear("final_norm", "model.norm")
    return rules if model.tie_embeddings else [*rules, *linear("head", "lm_head")]


def norm_rules(
    logical: str = LAYER, stored: str = STORED_LAYER, first_layer: int = 0
) -> list[Rule]:
    """The two norms of a layer."""
    pairs = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    return [
        Rule(f"{logical}{ours}.weight", f"{stored}{theirs}.weight", first_layer=first_layer)
        for ours, theirs in pairs.items()
    ]


def decoder_rules(model: ModelConfig) -> list[Rule]:
    """A plain decoder's tensors; biases and norms of queries and keys where the model
    has them.
    """
    attention = LAYER + "attention."
    stored = STORED_LAYER + "self_attn."
    rules = frame_rules(model) + norm_rules()
    for name in "qkv":
        rules += linear(attention + name, f"{stored}{name}_proj", bias=model.has_qkv_bias)
    rules += linear(attention + "o", stored + "o_proj", bias=model.linear_bias)
    if model.qk_norm:
        rules += linears({"q_norm": "q_norm", "k_norm": "k_norm"}, attention, stored)
    for ours, theirs in MLP.items():
        rules += linear(
            f"{LAYER}mlp.{ours}", f"{STORED_LAYER}mlp.{theirs}", bias=model.linear_bias
        )
    return rules
