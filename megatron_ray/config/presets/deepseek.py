"""Lists the shapes of DeepSeek's models and of models built like them, as published.

Must not know: how a model is built.
"""

from typing import Any

_LATENT: dict[str, Any] = {
    "activation": "swiglu",
    "norm": "rmsnorm",
    "position_embedding": "rope",
}
_V3_ROUTING: dict[str, Any] = {
    "score_function": "sigmoid",
    "expert_bias": True,
    "bias_update_rate": 1e-3,
    "aux_loss": "seq_aux_loss",
    "aux_loss_coeff": 1e-4,
}
_YARN: dict[str, Any] = {
    "kind": "yarn",
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
}

DEEPSEEK: dict[str, dict[str, Any]] = {
    # DeepSeek-V3 in small sizes; layers and heads are multiples of 4, as in gpt-tiny.
    "deepseek-tiny": {
        **_LATENT,
        "num_layers": 4,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "ffn_hidden_size": 384,
        "max_sequence_length": 1024,
        "mla": {
            "q_lora_rank": 64,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
        },
        "moe": {
            **_V3_ROUTING,
            "num_experts": 8,
            "top_k": 2,
            "num_groups": 2,
            "group_top_k": 1,
            "ffn_hidden_size": 128,
            "shared_expert_ffn_hidden_size": 128,
            "layer_pattern": [0, 1, 1, 1],
            "scaling_factor": 2.5,
        },
        "mtp": {"num_layers": 1},
    },
    "deepseek-v2-lite": {
        **_LATENT,
        "num_layers": 27,
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "ffn_hidden_size": 10944,
        "vocab_size": 102400,
        "max_sequence_length": 163840,
        "norm_eps": 1e-6,
        "rope_scaling": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        "mla": {"q_lora_rank": None},
        "moe": {
            "num_experts": 64,
            "top_k": 6,
            "pre_softmax": True,
            "ffn_hidden_size": 1408,
            "shared_expert_ffn_hidden_size": 2 * 1408,
            "layer_pattern": [0] + [1] * 26,
            "aux_loss": "seq_aux_loss",
            "aux_loss_coeff": 1e-3,
        },
    },
    "moonlight-16b": {
        **_LATENT,
        "num_layers": 27,
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "ffn_hidden_size": 11264,
        "vocab_size": 163840,
        "max_sequence_length": 8192,
        "norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "mla": {"q_lora_rank": None},
        "moe": {
            **_V3_ROUTING,
            "num_experts": 64,
            "top_k": 6,
            "ffn_hidden_size": 1408,
            "shared_expert_ffn_hidden_size": 2 * 1408,
            "layer_pattern": [0] + [1] * 26,
            "scaling_factor": 2.446,
        },
    },
    "deepseek-v3": {
        **_LATENT,
        "num_layers": 61,
        "hidden_size": 7168,
        "num_attention_heads": 128,
        "ffn_hidden_size": 18432,
        "vocab_size": 129280,
        "max_sequence_length": 163840,
        "norm_eps": 1e-6,
        "init_std": 0.006,
        "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        "mla": {},
        "moe": {
            **_V3_ROUTING,
            "num_experts": 256,
            "top_k": 8,
            "num_groups": 8,
            "group_top_k": 4,
            "ffn_hidden_size": 2048,
            "shared_expert_ffn_hidden_size": 2048,
            "layer_pattern": [0] * 3 + [1] * 58,
            "scaling_factor": 2.5,
        },
        "mtp": {"num_layers": 1, "loss_coeff": 0.1},
    },
}
