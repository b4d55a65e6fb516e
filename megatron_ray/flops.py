"""Model FLOPs of a training step. Owns: the one count that MFU means here. Torch-free.

6 N + 12 L H S per token (PaLM, appendix B): N matrix parameters with the output head and without the embedding look-up, attention
counted as the full square, no causal halving, as Megatron and nanoGPT do, and nothing taken off for sliding windows.
"""

from megatron_ray.config.model import ModelConfig


def matmul_parameters(model: ModelConfig) -> int:
    """Parameters that a token is multiplied with: of experts, those it goes to."""
    heads, groups = model.num_attention_heads * model.head_width, model.kv_heads * model.head_width
    widths = sum(_ffn_width(model, layer) for layer in range(model.num_layers))
    matrices = 3 if model.gated else 2
    routers = sum(moe.num_experts for layer in range(model.num_layers) if (moe := model.experts_on(layer)) is not None)
    return model.hidden_size * (model.num_layers * (2 * heads + 2 * groups) + matrices * widths + routers + model.vocabulary)


def _ffn_width(model: ModelConfig, layer: int) -> int:
    """Of all the MLPs that a token goes through in a layer."""
    moe = model.experts_on(layer)
    if moe is None:
        return model.ffn_width
    return moe.top_k * model.expert_width + (moe.shared_expert_ffn_hidden_size or 0)


def flops_per_token(model: ModelConfig, seq_length: int) -> int:
    """Forward and backward."""
    attention = 12 * model.num_layers * model.num_attention_heads * model.head_width * seq_length
    return 6 * matmul_parameters(model) + attention
