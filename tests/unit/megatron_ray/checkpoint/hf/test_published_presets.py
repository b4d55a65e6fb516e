"""Every shipped preset is the model of the config.json that it stands for."""

from typing import Any

import pytest

from megatron_ray.checkpoint.hf.families.registry import find_family, read_model
from megatron_ray.config.model import ModelConfig
from megatron_ray.config.presets.presets import PRESETS
from megatron_ray.validation.initial_weights import model_signature

Values = dict[str, Any]


def llama(
    layers: int, hidden: int, heads: int, groups: int, ffn: int, **rest: Any
) -> Values:
    """The keys that all families with Llama's names have."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": ffn,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        **rest,
    }


def gpt2(layers: int, hidden: int, heads: int) -> Values:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "n_ctx": 1024,
        "n_positions": 1024,
        "n_layer": layers,
        "n_embd": hidden,
        "n_head": heads,
        "vocab_size": 50257,
    }


LLAMA2: Values = {
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rope_scaling": None,
}
LLAMA3: Values = {
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
SCALING: Values = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA31 = LLAMA3 | {"max_position_embeddings": 131072, "rope_scaling": SCALING}
LLAMA32 = LLAMA31 | {
    "rope_scaling": SCALING | {"factor": 32.0},
    "tie_word_embeddings": True,
}
MISTRAL: Values = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
}
MIXTRAL: Values = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
QWEN2: Values = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "rms_norm_eps": 1e-6,
    "vocab_size": 151936,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "use_sliding_window": False,
}
QWEN3: Values = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
    "sliding_window": None,
    "use_sliding_window": False,
}
QWEN3_MOE = QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
GEMMA: Values = {
    "architectures": ["GemmaForCausalLM"],
    "model_type": "gemma",
    "hidden_act": "gelu",
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
LATENT: Values = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "moe_layer_freq": 1,
    "attention_bias": False,
}
YARN: Values = {
    "type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 4096,
}
DEEPSEEK_V2_LITE: Values = LATENT | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "vocab_size": 102400,
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "q_lora_rank": None,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1408,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_method": "greedy",
}
V3: Values = LATENT | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
MOONLIGHT = V3 | {
    "vocab_size": 163840,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
    "q_lora_rank": None,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1408,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.446,
    "num_nextn_predict_layers": 0,
}
DEEPSEEK_V3 = V3 | {
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "q_lora_rank": 1536,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
}

PUBLISHED: dict[str, Values] = {
    "gpt2-124m": gpt2(12, 768, 12),
    "gpt2-355m": gpt2(24, 1024, 16),
    "gpt2-774m": gpt2(36, 1280, 20),
    "gpt2-1.5b": gpt2(48, 1600, 25),
    "llama2-7b": llama(32, 4096, 32, 32, 11008, **LLAMA2),
    "llama2-13b": llama(40, 5120, 40, 40, 13824, **LLAMA2),
    "llama2-70b": llama(80, 8192, 64, 8, 28672, **LLAMA2),
    "llama3-8b": llama(32, 4096, 32, 8, 14336, **LLAMA3),
    "llama3-70b": llama(80, 8192, 64, 8, 28672, **LLAMA3),
    "llama3.1-8b": llama(32, 4096, 32, 8, 14336, **LLAMA31),
    "llama3.1-70b": llama(80, 8192, 64, 8, 28672, **LLAMA31),
    "llama3.1-405b": llama(126, 16384, 128, 8, 53248, **LLAMA31),
    "llama3.2-1b": llama(16, 2048, 32, 8, 8192, **LLAMA32),
    "llama3.2-3b": llama(28, 3072, 24, 8, 8192, **LLAMA32),
    "mistral-7b": llama(32, 4096, 32, 8, 14336, **MISTRAL),
    "mixtral-8x7b": llama(32, 4096, 32, 8, 14336, **MIXTRAL),
    "mixtral-8x22b": llama(
        56, 6144, 48, 8, 16384, **MIXTRAL | {"max_position_embeddings": 65536}
    ),
    "qwen2-0.5b": llama(24, 896, 14, 2, 4864, **QWEN2 | {"tie_word_embeddings": True}),
    "qwen2-1.5b": llama(28, 1536, 12, 2, 8960, **QWEN2 | {"tie_word_embeddings": True}),
    "qwen2-7b": llama(28, 3584, 28, 4, 18944, **QWEN2 | {"vocab_size": 152064}),
    "qwen2-72b": llama(
        *(80, 8192, 64, 8, 29568),
        **QWEN2 | {"vocab_size": 152064, "rms_norm_eps": 1e-5},
    ),
    "qwen3-0.6b": llama(28, 1024, 16, 8, 3072, **QWEN3 | {"tie_word_embeddings": True}),
    "qwen3-1.7b": llama(28, 2048, 16, 8, 6144, **QWEN3 | {"tie_word_embeddings": True}),
    "qwen3-4b": llama(36, 2560, 32, 8, 9728, **QWEN3 | {"tie_word_embeddings": True}),
    "qwen3-8b": llama(36, 4096, 32, 8, 12288, **QWEN3),
    "qwen3-14b": llama(40, 5120, 40, 8, 17408, **QWEN3),
    "qwen3-32b": llama(64, 5120, 64, 8, 25600, **QWEN3),
    "qwen3-30b-a3b": llama(
        48, 2048, 32, 4, 6144, **QWEN3_MOE | {"moe_intermediate_size": 768}
    ),
    "qwen3-235b-a22b": llama(
        94, 4096, 64, 4, 12288, **QWEN3_MOE | {"moe_intermediate_size": 1536}
    ),
    "gemma-2b": llama(18, 2048, 8, 1, 16384, **GEMMA),
    "gemma-7b": llama(28, 3072, 16, 16, 24576, **GEMMA),
    "deepseek-v2-lite": llama(27, 2048, 16, 16, 10944, **DEEPSEEK_V2_LITE),
    "moonlight-16b": llama(27, 2048, 16, 16, 11264, **MOONLIGHT),
    "deepseek-v3": llama(61, 7168, 128, 128, 18432, **DEEPSEEK_V3),
}
"""What config.json of the repository named in the presets has, as far as it matters."""
UNPUBLISHED = {"llama3-405b"}
"""Its weights were published with a longer context only."""


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_preset_is_the_model_of_its_config(preset: str) -> None:
    values = PUBLISHED[preset]
    published = read_model(find_family(values, "config.json"), values, "config.json")
    model = ModelConfig.model_validate({"preset": preset})
    assert model_signature(model) == model_signature(published)


def test_every_preset_but_the_tiny_ones_stands_for_a_config() -> None:
    tiny = {name for name in PRESETS if name.endswith("-tiny")}
    assert PRESETS.keys() - tiny - UNPUBLISHED == PUBLISHED.keys()
