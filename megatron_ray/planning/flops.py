"""Counts the model FLOPs of a training step, as MFU is defined here.

Per layer and token they are 6 N + 6 (D + V) h S (PaLM, appendix B), with N the weights
of matrix products, output head included and embedding look-up excluded, S the sequence
length, and h heads whose queries and keys have width D and whose values have width V.
With D = V = H / h that is 6 N + 12 H S.

Attention is counted as the full square without causal halving, as Megatron and nanoGPT
do, and sliding windows do not reduce it. A multi-token prediction (MTP) layer counts as
a layer, plus its projection (2 H^2) and the head once more. Torch-free.
"""

from megatron_ray.config.model import ModelConfig


def matmul_parameters(model: ModelConfig) -> int:
    """Returns the weights that a token is multiplied by: of experts only the chosen."""
    num_layers = model.num_layers + model.num_mtp_layers
    ffn_width = 0
    num_experts = 0
    for layer in range(num_layers):
        ffn_width += _ffn_width(model, layer)
        moe = model.experts_on(layer)
        if moe is not None:
            num_experts += moe.num_experts
    matrices = 3 if model.gated else 2
    mtp_projections = model.num_mtp_layers * 2 * model.hidden_size
    heads = (1 + model.num_mtp_layers) * model.vocabulary
    columns = matrices * ffn_width + num_experts + mtp_projections + heads
    return num_layers * attention_parameters(model) + model.hidden_size * columns


def attention_parameters(model: ModelConfig) -> int:
    """Returns the weights of the matrix products of one layer's attention."""
    hidden = model.hidden_size
    heads = model.num_attention_heads
    mla = model.mla
    if mla is None:
        # Queries and outputs, keys and values.
        return hidden * 2 * (heads + model.kv_heads) * model.head_width
    query_width = heads * mla.qk_head_dim
    if mla.q_lora_rank is None:
        queries = hidden * query_width
    else:
        queries = mla.q_lora_rank * (hidden + query_width)
    latent = hidden * (mla.kv_lora_rank + mla.qk_rope_head_dim)
    keys_values = mla.kv_lora_rank * (mla.qk_nope_head_dim + mla.v_head_dim)
    outputs = mla.v_head_dim * hidden
    return queries + latent + heads * (keys_values + outputs)


def _ffn_width(model: ModelConfig, layer: int) -> int:
    """Returns the width of all MLPs together that a token passes in a layer."""
    moe = model.experts_on(layer)
    if moe is None:
        return model.ffn_width
    return moe.top_k * model.expert_width + (moe.shared_expert_ffn_hidden_size or 0)


def flops_per_token(model: ModelConfig, seq_length: int) -> int:
    """Returns the model FLOPs of a token, forward and backward."""
    num_layers = model.num_layers + model.num_mtp_layers
    head_widths = model.head_width + model.value_width
    # 2 FLOPs per score and element for Q K^T and the product with V, and twice that for
    # the backward pass.
    attention = 6 * num_layers * model.num_attention_heads * head_widths * seq_length
    return 6 * matmul_parameters(model) + attention
