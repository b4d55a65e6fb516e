"""Llama, Mistral, Qwen2, Qwen3 and Gemma.

Owns: what tells them apart. Pure. Must not know: files, torch.
"""

from math import isclose, sqrt
from typing import Any

from megatron_ray.checkpoint.hf.families.decoder import (
    decoder_rules,
    read_decoder,
    read_windows,
    write_decoder,
    write_windows,
)
from megatron_ray.checkpoint.hf.families.family import Family
from megatron_ray.checkpoint.hf.options import Options
from megatron_ray.config.model import ModelConfig

_GELU = ("gelu_pytorch_tanh", "gelu")
"""Gemma's first published files say `gelu` and mean the approximation, as transformers
knows too."""


def _read_llama(options: Options) -> dict[str, Any]:
    attention = options.flag("attention_bias", False)
    mlp = options.flag("mlp_bias", False)
    if attention != mlp:
        text = (
            f"attention_bias={attention} with mlp_bias={mlp} is not supported: all linear "
            "layers have a bias, or none"
        )
        raise options.refuse(text.replace("True", "true").replace("False", "false"))
    return read_decoder(options) | {"linear_bias": attention}


def _write_llama(model: ModelConfig) -> dict[str, Any]:
    return write_decoder(model) | {
        "attention_bias": model.linear_bias,
        "mlp_bias": model.linear_bias,
    }


def _read_mistral(options: Options) -> dict[str, Any]:
    # The key that is missing and the key that is null mean different things here.
    window = options.values.get("sliding_window", 4096)
    return read_decoder(options) | {
        "sliding_window": window,
        "num_query_groups": options.get("num_key_value_heads", 8),
    }


def _write_mistral(model: ModelConfig) -> dict[str, Any]:
    return write_decoder(model) | {"sliding_window": model.sliding_window}


def _read_qwen2(options: Options) -> dict[str, Any]:
    fields = read_decoder(options)
    return fields | read_windows(options, fields["num_layers"]) | {"qkv_bias": True}


def _write_qwen2(model: ModelConfig) -> dict[str, Any]:
    return write_decoder(model) | write_windows(model)


def _read_qwen3(options: Options) -> dict[str, Any]:
    options.only("attention_bias", (False,), False)
    fields = read_decoder(options, head_dim=128)
    return fields | read_windows(options, fields["num_layers"]) | {"qk_norm": True}


def _write_qwen3(model: ModelConfig) -> dict[str, Any]:
    return write_decoder(model) | write_windows(model) | {"attention_bias": False}


def _read_gemma(options: Options) -> dict[str, Any]:
    options.only("attention_bias", (False,), False)
    options.only("use_bidirectional_attention", (False,), False)
    options.only(
        "hidden_activation" if options.get("hidden_activation") else "hidden_act",
        _GELU,
        _GELU[0],
    )
    known = Options({**options.values, "hidden_act": "silu"}, options.where)
    own = {
        "activation": "geglu_tanh",
        "zero_centered_norm": True,
        "embedding_scale": sqrt(options.number("hidden_size")),
    }
    return read_decoder(known, head_dim=256, tied=True) | own


def _write_gemma(model: ModelConfig) -> dict[str, Any]:
    scaled = isclose(model.embedding_scale, sqrt(model.hidden_size), rel_tol=1e-6)
    own = {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
    }
    return write_decoder(model) | own if scaled else write_decoder(model)


LLAMA = Family("llama", "LlamaForCausalLM", _read_llama, _write_llama, decoder_rules)
MISTRAL = Family(
    "mistral", "MistralForCausalLM", _read_mistral, _write_mistral, decoder_rules
)
QWEN2 = Family("qwen2", "Qwen2ForCausalLM", _read_qwen2, _write_qwen2, decoder_rules)
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", _read_qwen3, _write_qwen3, decoder_rules)
GEMMA = Family("gemma", "GemmaForCausalLM", _read_gemma, _write_gemma, decoder_rules)
