"""Logical parameter names <- Hugging Face state dicts of Llama, Mixtral and GPT-2 shape, for the judges."""

import torch
from torch import Tensor

from megatron_ray.config.model import ModelConfig
from megatron_ray.optimizer.sharded import ShardedOptimizer
from megatron_ray.parallelize import ParallelModel


def llama_logical(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Weights (or gradients) of a LlamaForCausalLM by logical name."""
    found = {
        "embedding.weight": state["model.embed_tokens.weight"],
        "final_norm.weight": state["model.norm.weight"],
        "head.weight": state["lm_head.weight"],
    }
    names = {
        "attention_norm": "input_layernorm",
        "attention.q": "self_attn.q_proj",
        "attention.k": "self_attn.k_proj",
        "attention.v": "self_attn.v_proj",
        "attention.o": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    }
    for layer in range(config.num_layers):
        for ours, theirs in names.items():
            if config.moe is None or not ours.startswith("mlp."):
                found[f"layers.{layer}.{ours}.weight"] = state[f"model.layers.{layer}.{theirs}.weight"]
    return found


def mixtral_logical(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Weights (or gradients) of a MixtralForCausalLM by logical name; it keeps the matrices of a layer's experts in two tensors."""
    found = llama_logical(state, config)
    for layer in range(config.num_layers):
        theirs, ours = f"model.layers.{layer}.mlp.", f"layers.{layer}.moe."
        found[ours + "router.weight"] = state[theirs + "gate.weight"]
        for expert, (gate_up, down) in enumerate(
            zip(state[theirs + "experts.gate_up_proj"], state[theirs + "experts.down_proj"], strict=True)
        ):
            gate, up = gate_up.chunk(2)
            found |= {f"{ours}experts.{expert}.{name}.weight": part for name, part in (("gate", gate), ("up", up), ("down", down))}
    return found


def gpt2_logical(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Weights (or gradients) of a GPT2LMHeadModel by logical name; its Conv1D matrices are stored transposed."""
    found = {
        "embedding.weight": state["transformer.wte.weight"],
        "position_embedding.weight": state["transformer.wpe.weight"],
        "final_norm.weight": state["transformer.ln_f.weight"],
        "final_norm.bias": state["transformer.ln_f.bias"],
    }
    names = {"attention_norm": "ln_1", "attention.o": "attn.c_proj", "mlp_norm": "ln_2", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
    for layer in range(config.num_layers):
        prefix = f"transformer.h.{layer}."
        for ours, theirs in names.items():
            for kind in ("weight", "bias"):
                tensor = state[f"{prefix}{theirs}.{kind}"]
                found[f"layers.{layer}.{ours}.{kind}"] = tensor.t() if tensor.dim() == 2 else tensor
        fused_weight, fused_bias = state[f"{prefix}attn.c_attn.weight"].t(), state[f"{prefix}attn.c_attn.bias"]
        for name, weight, bias in zip("qkv", fused_weight.chunk(3), fused_bias.chunk(3), strict=True):
            found[f"layers.{layer}.attention.{name}.weight"] = weight
            found[f"layers.{layer}.attention.{name}.bias"] = bias
    return found


def perturb(model: torch.nn.Module, seed: int = 0) -> None:
    """Norms away from one, biases away from zero, matrices larger: so that a forgotten term shows."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.empty_like(parameter).normal_(0, 0.1 if parameter.dim() == 1 else 0.03, generator=generator)
        parameter.data.add_(noise)


def fill(model: ParallelModel, optimizer: ShardedOptimizer, logical: dict[str, Tensor]) -> None:
    """Sets every parameter from full logical tensors."""
    for local in model.parameters:
        value = torch.zeros(local.shape)
        for part in local.parts:
            source = logical[part.logical.name].detach().float()
            for dim, (offset, size) in enumerate(zip(part.box.offset, part.box.size, strict=True)):
                source = source.narrow(dim, offset, size)
            value.narrow(0, part.start, part.box.size[0]).copy_(source)
        optimizer.initialise(local.name, value)
