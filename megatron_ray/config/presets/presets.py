"""Lists named model shapes with their published sizes.

Each family's numbers are those of the `config.json` in the Hugging Face repository named
above it. Must not know: how a model is built.
"""

from typing import Any

from megatron_ray.config.presets.deepseek import DEEPSEEK


def _sized(
    family: dict[str, Any],
    layers: int,
    hidden: int,
    heads: int,
    groups: int,
    ffn: int,
    **rest: Any,
) -> dict[str, Any]:
    """Returns the shape of one model of a family.

    `groups` is the number of key/value heads, `ffn` the width inside the MLP; `rest` are
    further fields that differ from the family's.
    """
    sizes = {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "ffn_hidden_size": ffn,
    }
    # Without grouped-query attention num_query_groups is omitted, so that overriding
    # num_attention_heads of a preset needs no second field.
    if groups != heads:
        sizes["num_query_groups"] = groups
    return family | sizes | rest


_LLAMA: dict[str, Any] = {
    "activation": "swiglu",
    "norm": "rmsnorm",
    "position_embedding": "rope",
    "norm_eps": 1e-5,
}
_GPT2: dict[str, Any] = {
    "activation": "gelu_tanh",
    "norm": "layernorm",
    "position_embedding": "learned",
    "linear_bias": True,
    "tie_embeddings": True,
    "max_sequence_length": 1024,
    "norm_eps": 1e-5,
}
_LLAMA2 = _LLAMA | {"vocab_size": 32000, "rope_theta": 10000.0, "max_sequence_length": 4096}
_LLAMA3 = _LLAMA | {
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "max_sequence_length": 8192,
}
_LLAMA3_SCALING = {
    "kind": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA31 = _LLAMA3 | {"max_sequence_length": 131072, "rope_scaling": _LLAMA3_SCALING}
_LLAMA32 = _LLAMA31 | {
    "rope_scaling": _LLAMA3_SCALING | {"factor": 32.0},
    "tie_embeddings": True,
}
_MISTRAL = _LLAMA | {
    "vocab_size": 32000,
    "rope_theta": 10000.0,
    "max_sequence_length": 32768,
    "sliding_window": 4096,
}
_MIXTRAL = _LLAMA | {"vocab_size": 32000, "rope_theta": 1e6, "max_sequence_length": 32768}
_QWEN2 = _LLAMA | {
    "vocab_size": 151936,
    "rope_theta": 1e6,
    "norm_eps": 1e-6,
    "max_sequence_length": 131072,
    "qkv_bias": True,
}
_QWEN3 = _LLAMA | {
    "vocab_size": 151936,
    "rope_theta": 1e6,
    "norm_eps": 1e-6,
    "max_sequence_length": 40960,
    "head_dim": 128,
    "qk_norm": True,
}
_GEMMA = _LLAMA | {
    "activation": "geglu_tanh",
    "zero_centered_norm": True,
    "norm_eps": 1e-6,
    "vocab_size": 256000,
    "max_sequence_length": 8192,
    "head_dim": 256,
    "tie_embeddings": True,
}


def _qwen3_experts(width: int) -> dict[str, Any]:
    return {
        "num_experts": 128,
        "top_k": 8,
        "ffn_hidden_size": width,
        "aux_loss_coeff": 0.001,
    }


# Layers and heads are multiples of 4, so that every small layout is legal.
_TINY: dict[str, dict[str, Any]] = {
    "gpt-tiny": _sized(_LLAMA, 4, 128, 4, 4, 384, max_sequence_length=1024),
    "moe-tiny": _sized(
        _LLAMA,
        4,
        128,
        4,
        4,
        256,
        max_sequence_length=1024,
        moe={"num_experts": 8, "top_k": 2, "aux_loss_coeff": 0.01},
    ),
    "gpt2-tiny": _sized(_GPT2, 4, 128, 4, 4, 512),
    # Like their families, except for the vocabulary, which the tokenizer determines.
    "mistral-tiny": _sized(
        _MISTRAL,
        4,
        128,
        4,
        4,
        384,
        vocab_size=None,
        max_sequence_length=1024,
        sliding_window=128,
    ),
    "qwen3-tiny": _sized(
        _QWEN3,
        4,
        128,
        4,
        4,
        384,
        vocab_size=None,
        max_sequence_length=1024,
        head_dim=32,
        tie_embeddings=True,
    ),
    "gemma-tiny": _sized(
        _GEMMA,
        4,
        128,
        4,
        4,
        512,
        vocab_size=None,
        max_sequence_length=1024,
        head_dim=64,
        embedding_scale=128**0.5,
    ),
}

PRESETS: dict[str, dict[str, Any]] = _TINY | {
    # openai-community/gpt2, gpt2-medium, gpt2-large, gpt2-xl
    "gpt2-124m": _sized(_GPT2, 12, 768, 12, 12, 3072, vocab_size=50257),
    "gpt2-355m": _sized(_GPT2, 24, 1024, 16, 16, 4096, vocab_size=50257),
    "gpt2-774m": _sized(_GPT2, 36, 1280, 20, 20, 5120, vocab_size=50257),
    "gpt2-1.5b": _sized(_GPT2, 48, 1600, 25, 25, 6400, vocab_size=50257),
    # meta-llama/Llama-2-*-hf
    "llama2-7b": _sized(_LLAMA2, 32, 4096, 32, 32, 11008),
    "llama2-13b": _sized(_LLAMA2, 40, 5120, 40, 40, 13824),
    "llama2-70b": _sized(_LLAMA2, 80, 8192, 64, 8, 28672),
    # meta-llama/Meta-Llama-3-*; 405B as it was pre-trained (Llama 3 herd, section 3),
    # before its context was stretched.
    "llama3-8b": _sized(_LLAMA3, 32, 4096, 32, 8, 14336),
    "llama3-70b": _sized(_LLAMA3, 80, 8192, 64, 8, 28672),
    "llama3-405b": _sized(_LLAMA3, 126, 16384, 128, 8, 53248),
    # meta-llama/Llama-3.1-* and Llama-3.2-*
    "llama3.1-8b": _sized(_LLAMA31, 32, 4096, 32, 8, 14336),
    "llama3.1-70b": _sized(_LLAMA31, 80, 8192, 64, 8, 28672),
    "llama3.1-405b": _sized(_LLAMA31, 126, 16384, 128, 8, 53248),
    "llama3.2-1b": _sized(_LLAMA32, 16, 2048, 32, 8, 8192),
    "llama3.2-3b": _sized(_LLAMA32, 28, 3072, 24, 8, 8192),
    # mistralai/Mistral-7B-v0.1, Mixtral-8x7B-v0.1, Mixtral-8x22B-v0.1
    "mistral-7b": _sized(_MISTRAL, 32, 4096, 32, 8, 14336),
    "mixtral-8x7b": _sized(
        _MIXTRAL,
        32,
        4096,
        32,
        8,
        14336,
        moe={"num_experts": 8, "top_k": 2, "aux_loss_coeff": 0.02},
    ),
    "mixtral-8x22b": _sized(
        *(_MIXTRAL, 56, 6144, 48, 8, 16384),
        max_sequence_length=65536,
        moe={"num_experts": 8, "top_k": 2, "aux_loss_coeff": 0.001},
    ),
    # Qwen/Qwen2-*; those of Qwen2.5 have the same shapes. The instruction-tuned 72B has
    # norm_eps 1e-6.
    "qwen2-0.5b": _sized(_QWEN2, 24, 896, 14, 2, 4864, tie_embeddings=True),
    "qwen2-1.5b": _sized(_QWEN2, 28, 1536, 12, 2, 8960, tie_embeddings=True),
    "qwen2-7b": _sized(_QWEN2, 28, 3584, 28, 4, 18944, vocab_size=152064),
    "qwen2-72b": _sized(_QWEN2, 80, 8192, 64, 8, 29568, vocab_size=152064, norm_eps=1e-5),
    # Qwen/Qwen3-*
    "qwen3-0.6b": _sized(_QWEN3, 28, 1024, 16, 8, 3072, tie_embeddings=True),
    "qwen3-1.7b": _sized(_QWEN3, 28, 2048, 16, 8, 6144, tie_embeddings=True),
    "qwen3-4b": _sized(_QWEN3, 36, 2560, 32, 8, 9728, tie_embeddings=True),
    "qwen3-8b": _sized(_QWEN3, 36, 4096, 32, 8, 12288),
    "qwen3-14b": _sized(_QWEN3, 40, 5120, 40, 8, 17408),
    "qwen3-32b": _sized(_QWEN3, 64, 5120, 64, 8, 25600),
    "qwen3-30b-a3b": _sized(_QWEN3, 48, 2048, 32, 4, 6144, moe=_qwen3_experts(768)),
    "qwen3-235b-a22b": _sized(_QWEN3, 94, 4096, 64, 4, 12288, moe=_qwen3_experts(1536)),
    # google/gemma-2b, gemma-7b
    "gemma-2b": _sized(_GEMMA, 18, 2048, 8, 1, 16384, embedding_scale=2048**0.5),
    "gemma-7b": _sized(_GEMMA, 28, 3072, 16, 16, 24576, embedding_scale=3072**0.5),
    **DEEPSEEK,
}
