"""Model FLOPs of a training step. Owns: the one count that MFU means here. Torch-free.

6 N + 12 L H S per token (PaLM, appendix B): N matrix parameters with the output head and without the embedding look-up, attention
counted as the full square, no causal halving, as Megatron and nanoGPT do.
"""

from megatron_ray.config.model import ModelConfig


def matmul_parameters(model: ModelConfig) -> int:
    """Parameters that a token is multiplied with."""
    heads, groups = model.num_attention_heads * model.head_width, model.kv_heads * model.head_width
    matrices = 3 if model.activation == "swiglu" else 2
    block = model.hidden_size * (2 * heads + 2 * groups + matrices * model.ffn_width)
    return model.num_layers * block + model.vocabulary * model.hidden_size


def flops_per_token(model: ModelConfig, seq_length: int) -> int:
    """Forward and backward."""
    attention = 12 * model.num_layers * model.num_attention_heads * model.head_width * seq_length
    return 6 * matmul_parameters(model) + attention
