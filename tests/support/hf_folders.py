"""Folders as transformers writes them, one tiny model per family."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

VOCABULARY = 260
SEQUENCE = 64
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": SEQUENCE,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_GROUPED = _COMMON | {"num_key_value_heads": 2}
_WIDE = _GROUPED | {"head_dim": 16}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": SEQUENCE,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_LATENT = _COMMON | {
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "rope_parameters": _YARN,
    "rms_norm_eps": 1e-4,
}
_DEEPSEEK_V2 = _LATENT | {"attention_bias": True, "mlp_bias": True, "n_shared_experts": 2}
_DEEPSEEK_V3 = _LATENT | {"n_group": 4, "topk_group": 2, "num_nextn_predict_layers": 0}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", _GPT2),
    "llama": ("Llama", _GROUPED | {"rms_norm_eps": 1e-5}),
    "llama-tied": ("Llama", _GROUPED | {"tie_word_embeddings": True, "mlp_bias": True}),
    "llama3": ("Llama", _GROUPED | {"rope_parameters": _LLAMA3, "attention_bias": True}),
    "mistral": ("Mistral", _GROUPED | {"sliding_window": 16}),
    "mixtral": ("Mixtral", _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma": ("Gemma", _WIDE | {"num_key_value_heads": 1, "attention_bias": True}),
    "granite": (
        "Granite",
        _GROUPED
        | {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.0625,
            "logits_scaling": 6.0,
        },
    ),
    "qwen2": (
        "Qwen2",
        _GROUPED
        | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
    ),
    "qwen3": ("Qwen3", _WIDE | {"attention_bias": True}),
    "qwen3_moe": (
        "Qwen3Moe",
        _WIDE
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "num_hidden_layers": 3,
            "mlp_only_layers": [1],
            "attention_bias": True,
        },
    ),
    "deepseek_v2": ("DeepseekV2", _DEEPSEEK_V2 | {"topk_method": "greedy"}),
    "deepseek_v2-groups": (
        "DeepseekV2",
        _DEEPSEEK_V2
        | {
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "q_lora_rank": None,
        },
    ),
    # The number of chosen experts does not follow from the groups.
    "deepseek_v3": ("DeepseekV3", _DEEPSEEK_V3 | {"num_experts_per_tok": 3}),
    "deepseek_v3-mtp": (
        "DeepseekV3",
        _DEEPSEEK_V3 | {"q_lora_rank": None, "attention_bias": True},
    ),
}


def make(family: str, **changed: Any) -> transformers.PreTrainedModel:
    """A transformers model whose norms and biases are away from where they begin."""
    name, settings = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**settings | changed)
    torch.manual_seed(sum(map(ord, family)))
    model: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_config(
        config, experts_implementation="eager"
    )
    for tensor in [
        *model.parameters(),
        *(buffer for name, buffer in model.named_buffers() if "correction" in name),
    ]:
        tensor.data.add_(torch.randn_like(tensor), alpha=0.1 if tensor.dim() == 1 else 0.05)
    model.eval()
    return model


def publish(
    family: str,
    folder: Path,
    *,
    shard: str = "5GB",
    dtype: torch.dtype | None = None,
    **changed: Any,
) -> transformers.PreTrainedModel:
    """Writes the folder and returns the model."""
    model = make(family, **changed)
    if dtype is not None:
        module: nn.Module = model
        module.to(dtype)
    has_mtp = family.endswith("-mtp")
    model.save_pretrained(folder, max_shard_size="5GB" if has_mtp else shard)
    if has_mtp:
        add_mtp_layer(folder)
    return model


def edit_config(folder: Path, **changed: Any) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changed
    path.write_text(
        json.dumps({key: value for key, value in values.items() if value != "gone"})
    )


def edit_tensors(
    folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    path = folder / "model.safetensors"
    tensors = {
        name: tensor.contiguous() for name, tensor in change(load_file(path)).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})


def add_mtp_layer(folder: Path) -> None:
    """Adds the MTP layer that DeepSeek publishes and transformers does not save."""
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    last = f"model.layers.{layers - 1}."
    mtp_layer = f"model.layers.{layers}."

    def add(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        block = {
            mtp_layer + name.removeprefix(last): tensor + 0.01
            for name, tensor in tensors.items()
            if name.startswith(last)
        }
        norms = {
            f"{mtp_layer}{name}.weight": torch.rand(32)
            for name in ("enorm", "hnorm", "shared_head.norm")
        }
        copies = {
            mtp_layer + "embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
            mtp_layer + "shared_head.head.weight": tensors["lm_head.weight"].clone(),
        }
        return (
            tensors
            | block
            | norms
            | copies
            | {mtp_layer + "eh_proj.weight": torch.randn(32, 64)}
        )

    edit_tensors(folder, add)
    edit_config(folder, num_nextn_predict_layers=1)
