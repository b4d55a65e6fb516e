"""The families of models that transformers judges: a family is what it has beside a
plain Llama, in their words and in ours.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

from megatron_ray.config.model import ModelConfig
from tests.support.hf_names import (
    decoder_logical,
    gemma2_logical,
    gpt2_logical,
    perturb,
)


@dataclass(frozen=True)
class Sizes:
    """Of a judged model."""

    hidden: int = 64
    vocabulary: int = 211
    sequence: int = 48
    layers: int = 4


@dataclass(frozen=True)
class Family:
    """Names and fields of one family."""

    judge: str
    """`JudgeForCausalLM` and `JudgeConfig` of transformers."""
    config_fields: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)
    logical: Callable[[dict[str, Tensor], ModelConfig], dict[str, Tensor]] = decoder_logical

    def shape(self, sizes: Sizes) -> dict[str, Any]:
        """The model as it is called here."""
        plain = {
            "num_layers": sizes.layers,
            "hidden_size": sizes.hidden,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "ffn_hidden_size": 3 * sizes.hidden,
            "vocab_size": sizes.vocabulary,
            "max_sequence_length": sizes.sequence,
        }
        return plain | self.ours

    def build(self, sizes: Sizes, seed: int) -> torch.nn.Module:
        """The judge, its weights away from where they begin."""
        plain = {
            "vocab_size": sizes.vocabulary,
            "hidden_size": sizes.hidden,
            "intermediate_size": 3 * sizes.hidden,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": sizes.sequence,
            "rms_norm_eps": 1e-5,
            "rope_parameters": ROPE,
            "tie_word_embeddings": False,
            "attn_implementation": "sdpa",
            "experts_implementation": "eager",
        }
        if self.logical is gpt2_logical:
            plain = {
                "vocab_size": sizes.vocabulary,
                "n_positions": sizes.sequence,
                "n_embd": sizes.hidden,
                "n_layer": sizes.layers,
            }
        torch.manual_seed(seed)
        config = getattr(transformers, f"{self.judge}Config")(**plain | self.config_fields)
        head = "LMHeadModel" if self.logical is gpt2_logical else "ForCausalLM"
        model: torch.nn.Module = getattr(transformers, self.judge + head)(config)
        perturb(model)
        return model


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
YARN = {
    "factor": 4.0,
    "original_max_position_embeddings": 12,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
}
QK_NORM = {"qk_norm": True, "head_dim": 24}
ATTENTION_BIAS = {"qkv_bias": True, "attention_output_bias": True}
EXPERTS = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 48}

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        "GPT2",
        {
            "n_head": 4,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "attn_implementation": "sdpa",
        },
        {
            "num_query_groups": 4,
            "ffn_hidden_size": None,
            "activation": "gelu_tanh",
            "norm": "layernorm",
            "position_embedding": "learned",
            "linear_bias": True,
            "tie_embeddings": True,
        },
        gpt2_logical,
    ),
    "llama2": Family("Llama"),
    "llama3.1": Family(
        "Llama",
        {"rope_parameters": ROPE | {"rope_type": "llama3"} | LLAMA3},
        {"rope_scaling": {"kind": "llama3"} | LLAMA3},
    ),
    "llama-linear": Family(
        "Llama",
        {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 4.0}},
        {"rope_scaling": {"kind": "linear", "factor": 4.0}},
    ),
    "llama-yarn": Family(
        "Llama",
        {"rope_parameters": ROPE | {"rope_type": "yarn"} | YARN, "mlp_bias": True},
        {"rope_scaling": {"kind": "yarn"} | YARN, "mlp_bias": True},
    ),
    "mistral": Family(
        "Mistral", {"sliding_window": 11, "head_dim": None}, {"sliding_window": 11}
    ),
    "mixtral": Family(
        "Mixtral",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 48,
            "head_dim": None,
        },
        {"moe": EXPERTS},
    ),
    "qwen2": Family("Qwen2", {}, {"qkv_bias": True}),
    "qwen2-pattern": Family(
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 11,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        {"qkv_bias": True, "sliding_window": 11, "full_attention_every": 2},
    ),
    "qwen3": Family(
        "Qwen3",
        {"head_dim": 24, "tie_word_embeddings": True, "attention_bias": True},
        QK_NORM | ATTENTION_BIAS | {"tie_embeddings": True},
    ),
    "qwen3-moe": Family(
        "Qwen3Moe",
        {
            "head_dim": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
        },
        QK_NORM | {"moe": EXPERTS},
    ),
    "granite": Family(
        "Granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.125,
            "logits_scaling": 4.0,
            "attention_bias": True,
        },
        {
            "embedding_scale": 3.0,
            "residual_scale": 0.3,
            "attention_scale": 0.125,
            "logit_scale": 0.25,
        }
        | ATTENTION_BIAS,
    ),
    # Published ones also cap their scores and logits, which the model cannot do.
    "gemma2-without-caps": Family(
        "Gemma2",
        {
            "head_dim": 24,
            "query_pre_attn_scalar": 16,
            "sliding_window": 11,
            "tie_word_embeddings": True,
            "pad_token_id": None,
            "attn_implementation": "eager",
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
        {
            "head_dim": 24,
            "attention_scale": 0.25,
            "peri_norm": True,
            "activation": "geglu_tanh",
            "zero_centered_norm": True,
            "embedding_scale": 8.0,
            "sliding_window": 11,
            "full_attention_every": 2,
            "tie_embeddings": True,
        },
        gemma2_logical,
    ),
    "gemma": Family(
        "Gemma",
        # Its padding token would have no gradient.
        {
            "head_dim": 24,
            "num_key_value_heads": 1,
            "hidden_act": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
            "pad_token_id": None,
        },
        {
            "head_dim": 24,
            "num_query_groups": 1,
            "activation": "geglu_tanh",
            "zero_centered_norm": True,
            "embedding_scale": 8.0,
            "tie_embeddings": True,
        },
    ),
}
