"""Describes Llama, Mistral, Qwen2, Qwen3, Gemma and Granite.

Owns: their differences. Pure. Must not know: files, torch.
"""

from math import isclose, sqrt
from typing import Any

from megatron_ray.checkpoint.hf.families.decoder import (
    decoder_rules,
    read_attention_bias,
    read_decoder,
    read_windows,
    write_attention_bias,
    write_decoder,
    write_windows,
)
from megatron_ray.checkpoint.hf.families.family import Family, UnsupportedFieldError
from megatron_ray.checkpoint.hf.hf_config import HfConfig
from megatron_ray.config.model import ModelConfig

_GELU = ("gelu_pytorch_tanh", "gelu")
"""Gemma's first published files have `gelu` and mean the tanh approximation; transformers
treats them so too."""


def _read_llama(config: HfConfig) -> dict[str, Any]:
    return {
        **read_decoder(config),
        **read_attention_bias(config),
        "mlp_bias": config.flag("mlp_bias", False),
    }


def _write_llama(model: ModelConfig) -> dict[str, Any]:
    return {
        **write_decoder(model),
        **write_attention_bias(model),
        "mlp_bias": model.has_mlp_bias,
    }


def _read_mistral(config: HfConfig) -> dict[str, Any]:
    # A missing key means the default window, null means no window.
    window = config.values.get("sliding_window", 4096)
    # The default number of key/value heads is that of the published 7B model.
    return read_decoder(config) | {
        "sliding_window": window,
        "num_query_groups": config.get("num_key_value_heads", 8),
    }


def _write_mistral(model: ModelConfig) -> dict[str, Any]:
    return write_decoder(model) | {"sliding_window": model.sliding_window}


def _read_qwen2(config: HfConfig) -> dict[str, Any]:
    # Qwen2 always has biases in these projections; no key of config.json turns them off.
    fields = read_decoder(config)
    return fields | read_windows(config, fields["num_layers"]) | {"qkv_bias": True}


def _write_qwen2(model: ModelConfig) -> dict[str, Any]:
    return write_decoder(model) | write_windows(model)


def _read_qwen3(config: HfConfig) -> dict[str, Any]:
    # Qwen3's heads do not divide hidden_size, so their width has a default of its own.
    fields = read_decoder(config, head_dim=128) | read_attention_bias(config)
    return fields | read_windows(config, fields["num_layers"]) | {"qk_norm": True}


def _write_qwen3(model: ModelConfig) -> dict[str, Any]:
    return write_decoder(model) | write_windows(model) | write_attention_bias(model)


def _read_gemma(config: HfConfig) -> dict[str, Any]:
    config.one_of("use_bidirectional_attention", (False,), False)
    # The newer key takes precedence.
    key = "hidden_activation" if config.get("hidden_activation") else "hidden_act"
    config.one_of(key, _GELU, _GELU[0])
    # All other fields are read as for Llama, which accepts only its own activation.
    as_llama = HfConfig({**config.values, "hidden_act": "silu"}, config.where)
    fields = {
        **read_attention_bias(config),
        "activation": "geglu_tanh",
        "zero_centered_norm": True,
        "embedding_scale": sqrt(config.number("hidden_size")),
    }
    return read_decoder(as_llama, head_dim=256, tied=True) | fields


def _write_gemma(model: ModelConfig) -> dict[str, Any]:
    # Gemma's scale is implied by the family, so another one would be lost.
    scale = sqrt(model.hidden_size)
    if not isclose(model.embedding_scale, scale, rel_tol=1e-6):
        detail = (
            f"={model.embedding_scale:g} is not the square root of hidden_size, {scale:g}"
        )
        raise UnsupportedFieldError("embedding_scale", detail)
    return {
        **write_decoder(model),
        **write_attention_bias(model),
        "hidden_act": _GELU[0],
        "hidden_activation": _GELU[0],
    }


def _read_granite(config: HfConfig) -> dict[str, Any]:
    logits_scaling = config.number("logits_scaling", 1.0)
    if logits_scaling <= 0:
        raise config.error(f"logits_scaling is {logits_scaling!r}, more than 0 is needed")
    return {
        **_read_llama(config),
        "embedding_scale": config.number("embedding_multiplier", 1.0),
        "residual_scale": config.number("residual_multiplier", 1.0),
        "attention_scale": config.number("attention_multiplier", 1.0),
        "logit_scale": 1 / logits_scaling,
    }


def _write_granite(model: ModelConfig) -> dict[str, Any]:
    return {
        **_write_llama(model),
        "embedding_multiplier": model.embedding_scale,
        "residual_multiplier": model.residual_factor,
        "attention_multiplier": model.score_scale,
        "logits_scaling": 1 / model.logit_factor,
    }


LLAMA = Family("llama", "LlamaForCausalLM", _read_llama, _write_llama, decoder_rules)
MISTRAL = Family(
    "mistral", "MistralForCausalLM", _read_mistral, _write_mistral, decoder_rules
)
QWEN2 = Family("qwen2", "Qwen2ForCausalLM", _read_qwen2, _write_qwen2, decoder_rules)
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", _read_qwen3, _write_qwen3, decoder_rules)
GEMMA = Family("gemma", "GemmaForCausalLM", _read_gemma, _write_gemma, decoder_rules)
GRANITE = Family(
    "granite", "GraniteForCausalLM", _read_granite, _write_granite, decoder_rules
)
