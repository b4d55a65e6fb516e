"""GPT-2.

Owns: its config.json and names; linear layers are stored transposed, queries, keys and
values in one. Pure.
"""

from typing import Any

from megatron_ray.checkpoint.hf.families.family import Family
from megatron_ray.checkpoint.hf.options import Options
from megatron_ray.checkpoint.hf.places import Rule, linear
from megatron_ray.config.model import ModelConfig

_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
}


def _read(options: Options) -> dict[str, Any]:
    options.only("scale_attn_weights", (True,), True)
    options.only("scale_attn_by_inverse_layer_idx", (False,), False)
    options.only("add_cross_attention", (False,), False)
    dropout = options.number("resid_pdrop", 0.1)
    if options.number("embd_pdrop", 0.1) != dropout:
        raise options.refuse(
            "embd_pdrop differs from resid_pdrop, which is not supported: set both alike"
        )
    return {
        "num_layers": options.number("n_layer"),
        "hidden_size": options.number("n_embd"),
        "num_attention_heads": options.number("n_head"),
        "ffn_hidden_size": options.get("n_inner"),
        "vocab_size": options.number("vocab_size"),
        "max_sequence_length": options.number("n_positions", options.number("n_ctx", 1024)),
        "activation": _ACTIVATIONS[
            options.only("activation_function", _ACTIVATIONS, "gelu_new")
        ],
        "norm": "layernorm",
        "norm_eps": options.number("layer_norm_epsilon", 1e-5),
        "position_embedding": "learned",
        "linear_bias": True,
        "tie_embeddings": options.flag("tie_word_embeddings", True),
        "hidden_dropout": dropout,
        "attention_dropout": options.number("attn_pdrop", 0.1),
        "init_std": options.number("initializer_range", 0.02),
    }


def _write(model: ModelConfig) -> dict[str, Any]:
    return {
        "n_layer": model.num_layers,
        "n_embd": model.hidden_size,
        "n_head": model.num_attention_heads,
        "n_inner": model.ffn_width,
        "vocab_size": model.vocabulary,
        "n_positions": model.max_sequence_length,
        "n_ctx": model.max_sequence_length,
        "activation_function": "gelu_new"
        if model.activation == "gelu_tanh"
        else model.activation,
        "layer_norm_epsilon": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "resid_pdrop": model.hidden_dropout,
        "embd_pdrop": model.hidden_dropout,
        "attn_pdrop": model.attention_dropout,
        "initializer_range": model.init_std,
    }


def _rules(model: ModelConfig) -> list[Rule]:
    layer = "layers.{}."
    stored = "transformer.h.{}."
    rules = linear("embedding", "transformer.wte") + linear(
        "position_embedding", "transformer.wpe"
    )
    rules += linear("final_norm", "transformer.ln_f", bias=True)
    rules += [] if model.tie_embeddings else linear("head", "lm_head")
    for ours, theirs in {"attention_norm": "ln_1", "mlp_norm": "ln_2"}.items():
        rules += linear(layer + ours, stored + theirs, bias=True)
    for ours, theirs in {
        "attention.o": "attn.c_proj",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    }.items():
        rules += [
            Rule(f"{layer}{ours}.weight", f"{stored}{theirs}.weight", transposed=True)
        ]
        rules += [Rule(f"{layer}{ours}.bias", f"{stored}{theirs}.bias")]
    for part, name in enumerate("qkv"):
        ours = f"{layer}attention.{name}."
        theirs = stored + "attn.c_attn."
        rules += [
            Rule(ours + "weight", theirs + "weight", part=part, parts=3, transposed=True)
        ]
        rules += [Rule(ours + "bias", theirs + "bias", part=part, parts=3)]
    return rules


GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    _read,
    _write,
    _rules,
    prefix="transformer.",
    ignored=("*h.*.attn.bias", "*h.*.attn.masked_bias"),
)
