"""Logical parameter names <- Hugging Face state dicts, for the judges: one mapping for
Llama and all made like it, one for GPT-2, one for DeepSeek-V3.
"""

import torch
from torch import Tensor

from megatron_ray.config.architecture.latent import LatentAttentionConfig
from megatron_ray.config.model import ModelConfig
from megatron_ray.optimizer.sharded import ShardedOptimizer
from megatron_ray.parallelize.parallelize import ParallelModel


def decoder_logical(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Weights (or gradients) of a decoder with Llama's names, with or without biases,
    norms of heads and experts, by logical name.
    """
    tensors = {
        "embedding.weight": state["model.embed_tokens.weight"],
        "final_norm.weight": state["model.norm.weight"],
    }
    if not config.tie_embeddings:
        tensors["head.weight"] = state["lm_head.weight"]
    names = {
        "attention_norm.weight": "input_layernorm.weight",
        "mlp_norm.weight": "post_attention_layernorm.weight",
    }
    names |= {
        f"attention.{part}.weight": f"self_attn.{part}_proj.weight" for part in "qkvo"
    }
    if config.has_qkv_bias:
        names |= {f"attention.{part}.bias": f"self_attn.{part}_proj.bias" for part in "qkv"}
    if config.has_attention_output_bias:
        names["attention.o.bias"] = "self_attn.o_proj.bias"
    if config.qk_norm:
        names |= {
            f"attention.{part}_norm.weight": f"self_attn.{part}_norm.weight"
            for part in "qk"
        }
    if config.moe is None:
        names |= {
            f"mlp.{part}.weight": f"mlp.{part}_proj.weight"
            for part in ("gate", "up", "down")
        }
        if config.has_mlp_bias:
            names |= {
                f"mlp.{part}.bias": f"mlp.{part}_proj.bias"
                for part in ("gate", "up", "down")
            }
    for layer in range(config.num_layers):
        hf_prefix = f"model.layers.{layer}."
        tensors |= {
            f"layers.{layer}.{ours}": state[hf_prefix + name]
            for ours, name in names.items()
        }
        if config.moe is not None:
            tensors |= _experts(state, hf_prefix + "mlp.", f"layers.{layer}.moe.")
    return tensors


def gemma2_logical(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Those of Gemma 2, which has four norms in a layer."""
    tensors = decoder_logical(state, config)
    names = {
        "attention_output_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_output_norm": "post_feedforward_layernorm",
    }
    for layer in range(config.num_layers):
        for ours, name in names.items():
            stored = state[f"model.layers.{layer}.{name}.weight"]
            tensors[f"layers.{layer}.{ours}.weight"] = stored
    return tensors


def _experts(state: dict[str, Tensor], hf_prefix: str, ours: str) -> dict[str, Tensor]:
    """transformers keeps the matrices of a layer's experts in two tensors."""
    tensors = {ours + "router.weight": state[hf_prefix + "gate.weight"]}
    pairs = zip(
        state[hf_prefix + "experts.gate_up_proj"],
        state[hf_prefix + "experts.down_proj"],
        strict=True,
    )
    for expert, (gate_up, down) in enumerate(pairs):
        gate, up = gate_up.chunk(2)
        tensors |= {
            f"{ours}experts.{expert}.{name}.weight": part
            for name, part in (("gate", gate), ("up", up), ("down", down))
        }
    return tensors


def deepseek_logical(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Weights (or gradients) of a DeepseekV3ForCausalLM by logical name; its rotation
    turns neighbouring rows.
    """
    tensors = {
        "embedding.weight": state["model.embed_tokens.weight"],
        "final_norm.weight": state["model.norm.weight"],
        "head.weight": state["lm_head.weight"],
    }
    for layer in range(config.num_layers):
        tensors |= deepseek_block(
            state,
            config,
            f"model.layers.{layer}.",
            f"layers.{layer}.",
            config.experts_on(layer) is not None,
        )
    return tensors


def deepseek_block(
    state: dict[str, Tensor], config: ModelConfig, hf_prefix: str, ours: str, experts: bool
) -> dict[str, Tensor]:
    """One block's."""
    mla = config.mla
    names = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    assert mla is not None
    attention = {
        "kv_norm": "kv_a_layernorm",
        "kv_up": "kv_b_proj",
        "o": "o_proj",
        "kv_down": "kv_a_proj_with_mqa",
    }
    if mla.q_lora_rank is None:
        attention |= {"q": "q_proj"}
    else:
        attention |= {"q_down": "q_a_proj", "q_norm": "q_a_layernorm", "q_up": "q_b_proj"}
    names |= {f"attention.{name}": f"self_attn.{part}" for name, part in attention.items()}
    mlp, expert = ("moe.shared.", "mlp.shared_experts.") if experts else ("mlp.", "mlp.")
    names |= {mlp + name: f"{expert}{name}_proj" for name in ("gate", "up", "down")}
    names |= {"moe.router": "mlp.gate"} if experts else {}
    tensors = {
        f"{ours}{name}.weight": state[f"{hf_prefix}{part}.weight"]
        for name, part in names.items()
    }
    for name in ("q_down", "kv_down", "o"):
        has_bias = config.has_attention_output_bias if name == "o" else config.has_qkv_bias
        if has_bias and name in attention:
            bias = state[f"{hf_prefix}self_attn.{attention[name]}.bias"]
            tensors[f"{ours}attention.{name}.bias"] = bias
    key_bias = f"{ours}attention.kv_down.bias"
    if key_bias in tensors:
        order = _rotated_rows(config.num_attention_heads, mla)["kv_down"]
        tensors[key_bias] = tensors[key_bias][order]
    for name, order in _rotated_rows(config.num_attention_heads, mla).items():
        if f"{ours}attention.{name}.weight" in tensors:
            tensors[f"{ours}attention.{name}.weight"] = tensors[
                f"{ours}attention.{name}.weight"
            ][order]
    if experts:
        stacked = zip(
            state[f"{hf_prefix}mlp.experts.gate_up_proj"],
            state[f"{hf_prefix}mlp.experts.down_proj"],
            strict=True,
        )
        for number, (gate_up, down) in enumerate(stacked):
            gate, up = gate_up.chunk(2)
            parts = {"gate": gate, "up": up, "down": down}
            tensors |= {
                f"{ours}moe.experts.{number}.{name}.weight": part
                for name, part in parts.items()
            }
    return tensors


def _rotated_rows(heads: int, mla: LatentAttentionConfig) -> dict[str, list[int]]:
    queries = halves_of_pairs(heads, mla.qk_nope_head_dim, mla.qk_rope_head_dim)
    return {
        "q": queries,
        "q_up": queries,
        "kv_down": halves_of_pairs(1, mla.kv_lora_rank, mla.qk_rope_head_dim),
    }


def halves_of_pairs(heads: int, plain: int, rotated: int) -> list[int]:
    """Rows of a projection whose heads have `plain` rows and then `rotated` ones, of
    which the checkpoint turns neighbours (0, 1), (2, 3) ... and this library row i with
    row i + rotated / 2: row i here is row order[i] there.
    """
    of_head = [
        *range(plain),
        *range(plain, plain + rotated, 2),
        *range(plain + 1, plain + rotated, 2),
    ]
    return [head * (plain + rotated) + row for head in range(heads) for row in of_head]


def gpt2_logical(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Weights (or gradients) of a GPT2LMHeadModel by logical name; its Conv1D matrices
    are stored transposed.
    """
    tensors = {
        "embedding.weight": state["transformer.wte.weight"],
        "position_embedding.weight": state["transformer.wpe.weight"],
        "final_norm.weight": state["transformer.ln_f.weight"],
        "final_norm.bias": state["transformer.ln_f.bias"],
    }
    names = {
        "attention_norm": "ln_1",
        "attention.o": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    }
    for layer in range(config.num_layers):
        prefix = f"transformer.h.{layer}."
        for ours, hf_name in names.items():
            for kind in ("weight", "bias"):
                tensor = state[f"{prefix}{hf_name}.{kind}"]
                tensors[f"layers.{layer}.{ours}.{kind}"] = (
                    tensor.t() if tensor.dim() == 2 else tensor
                )
        fused_weight = state[f"{prefix}attn.c_attn.weight"].t()
        fused_bias = state[f"{prefix}attn.c_attn.bias"]
        for name, weight, bias in zip(
            "qkv", fused_weight.chunk(3), fused_bias.chunk(3), strict=True
        ):
            tensors[f"layers.{layer}.attention.{name}.weight"] = weight
            tensors[f"layers.{layer}.attention.{name}.bias"] = bias
    return tensors


def perturb(model: torch.nn.Module, seed: int = 0) -> None:
    """Norms away from one, biases away from zero, matrices larger: so that a forgotten
    term shows.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.empty_like(parameter).normal_(
            0, 0.1 if parameter.dim() == 1 else 0.03, generator=generator
        )
        parameter.data.add_(noise)


def fill(
    model: ParallelModel, optimizer: ShardedOptimizer, logical: dict[str, Tensor]
) -> None:
    """Sets every parameter from full logical tensors."""
    for local in model.parameters:
        value = torch.zeros(local.shape)
        for part in local.parts:
            source = logical[part.logical.name].detach().float()
            for dim, (offset, size) in enumerate(
                zip(part.box.offset, part.box.size, strict=True)
            ):
                source = source.narrow(dim, offset, size)
            value.narrow(0, part.start, part.box.size[0]).copy_(source)
        optimizer.initialise(local.name, value)
