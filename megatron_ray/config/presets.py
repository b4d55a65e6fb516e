"""Named model shapes. Owns: numbers as published. Must not know: how a model is built."""

from typing import Any

from megatron_ray.config.deepseek_presets import DEEPSEEK

_LLAMA: dict[str, Any] = {"activation": "swiglu", "norm": "rmsnorm", "position_embedding": "rope", "norm_eps": 1e-5}
_GPT2: dict[str, Any] = {
    "activation": "gelu_tanh",
    "norm": "layernorm",
    "position_embedding": "learned",
    "linear_bias": True,
    "tie_embeddings": True,
    "max_sequence_length": 1024,
    "norm_eps": 1e-5,
}

PRESETS: dict[str, dict[str, Any]] = {
    # Layers and heads are multiples of 4, so that every small layout is legal.
    "gpt-tiny": {
        **_LLAMA,
        "num_layers": 4,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "ffn_hidden_size": 384,
        "max_sequence_length": 1024,
    },
    "moe-tiny": {
        **_LLAMA,
        "num_layers": 4,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "ffn_hidden_size": 256,
        "max_sequence_length": 1024,
        "moe": {"num_experts": 8, "top_k": 2, "aux_loss_coeff": 0.01},
    },
    "gpt2-tiny": {**_GPT2, "num_layers": 4, "hidden_size": 128, "num_attention_heads": 4},
    "gpt2-124m": {**_GPT2, "num_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "vocab_size": 50257},
    "gpt2-355m": {**_GPT2, "num_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "vocab_size": 50257},
    "gpt2-774m": {**_GPT2, "num_layers": 36, "hidden_size": 1280, "num_attention_heads": 20, "vocab_size": 50257},
    "gpt2-1.5b": {**_GPT2, "num_layers": 48, "hidden_size": 1600, "num_attention_heads": 25, "vocab_size": 50257},
    "llama3-8b": {
        **_LLAMA,
        "num_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "ffn_hidden_size": 14336,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
        "max_sequence_length": 8192,
    },
    "llama3-70b": {
        **_LLAMA,
        "num_layers": 80,
        "hidden_size": 8192,
        "num_attention_heads": 64,
        "num_query_groups": 8,
        "ffn_hidden_size": 28672,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
        "max_sequence_length": 8192,
    },
    "llama3-405b": {
        **_LLAMA,
        "num_layers": 126,
        "hidden_size": 16384,
        "num_attention_heads": 128,
        "num_query_groups": 8,
        "ffn_hidden_size": 53248,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
        "max_sequence_length": 8192,
    },
    **DEEPSEEK,
}
