"""Describes GPT-2.

Its linear layers are stored transposed, and queries, keys and values in one tensor.
Pure. Must not know: files, torch.
"""

from typing import Any

from megatron_ray.checkpoint.hf.families.family import Family, UnsupportedFieldError
from megatron_ray.checkpoint.hf.hf_config import HfConfig
from megatron_ray.checkpoint.hf.tensor_locations import Rule, linear
from megatron_ray.config.model import ModelConfig

_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
}
_NORMS = {"attention_norm": "ln_1", "mlp_norm": "ln_2"}
_LINEARS = {
    "attention.o": "attn.c_proj",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}


def _read(config: HfConfig) -> dict[str, Any]:
    # Variants that ModelConfig does not have must have GPT-2's own values.
    config.one_of("scale_attn_weights", (True,), True)
    config.one_of("scale_attn_by_inverse_layer_idx", (False,), False)
    config.one_of("add_cross_attention", (False,), False)
    # ModelConfig has one rate for both.
    dropout = config.number("resid_pdrop", 0.1)
    if config.number("embd_pdrop", 0.1) != dropout:
        raise config.error(
            "embd_pdrop differs from resid_pdrop, which is not supported: set both alike"
        )
    activation = config.one_of("activation_function", _ACTIVATIONS, "gelu_new")
    return {
        "num_layers": config.number("n_layer"),
        "hidden_size": config.number("n_embd"),
        "num_attention_heads": config.number("n_head"),
        "ffn_hidden_size": config.get("n_inner"),
        "vocab_size": config.number("vocab_size"),
        "max_sequence_length": config.number("n_positions", config.number("n_ctx", 1024)),
        "activation": _ACTIVATIONS[activation],
        "norm": "layernorm",
        "norm_eps": config.number("layer_norm_epsilon", 1e-5),
        "position_embedding": "learned",
        "linear_bias": True,
        "tie_embeddings": config.flag("tie_word_embeddings", True),
        "hidden_dropout": dropout,
        "attention_dropout": config.number("attn_pdrop", 0.1),
        "init_std": config.number("initializer_range", 0.02),
    }


def _write(model: ModelConfig) -> dict[str, Any]:
    # gelu_tanh has the name that GPT-2 was published with.
    names = {"gelu_tanh": "gelu_new", "gelu": "gelu"}
    if model.activation not in names:
        detail = f"={model.activation!r} is not one of {', '.join(map(repr, names))}"
        raise UnsupportedFieldError("activation", detail)
    return {
        "n_layer": model.num_layers,
        "n_embd": model.hidden_size,
        "n_head": model.num_attention_heads,
        "n_inner": model.ffn_width,
        "vocab_size": model.vocabulary,
        "n_positions": model.max_sequence_length,
        "n_ctx": model.max_sequence_length,
        "activation_function": names[model.activation],
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
    rules = linear("embedding", "transformer.wte")
    rules += linear("position_embedding", "transformer.wpe")
    rules += linear("final_norm", "transformer.ln_f", bias=True)
    if not model.tie_embeddings:
        rules += linear("head", "lm_head")
    for logical_name, stored_name in _NORMS.items():
        rules += linear(layer + logical_name, stored + stored_name, bias=True)
    for logical_name, stored_name in _LINEARS.items():
        rules += [
            Rule(
                f"{layer}{logical_name}.weight",
                f"{stored}{stored_name}.weight",
                transposed=True,
            ),
            Rule(f"{layer}{logical_name}.bias", f"{stored}{stored_name}.bias"),
        ]
    # c_attn has the outputs for queries, keys and values one after another.
    for part, name in enumerate("qkv"):
        logical = f"{layer}attention.{name}."
        fused = f"{stored}attn.c_attn."
        rules += [
            Rule(logical + "weight", fused + "weight", part, parts=3, transposed=True),
            Rule(logical + "bias", fused + "bias", part, parts=3),
        ]
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
