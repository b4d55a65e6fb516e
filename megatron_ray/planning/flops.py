"""Model FLOPs of a training step.

Owns: the one count that MFU means here. Torch-free.

6 N + 6 (D + V) h S per layer and token (PaLM, appendix B): N matrix parameters with the
output head and without the embedding look-up, h heads whose queries and keys are D wide
and whose values V: 12 L H S where both are H / h. Attention is counted as the full
square, no causal halving, as Megatron and nanoGPT do, and nothing is taken off for
sliding windows. A layer that predicts a further token counts as a layer, its projection
(2 H^2) and the head once more.
"""

from megatron_ray.config.model import ModelConfig


def matmul_parameters(model: ModelConfig) -> int:
    """Parameters that a token is multiplied with: of experts, those it goes to."""
    layers = model.num_layers + model.num_mtp_layers
    matrices = 3 if model.gated else 2
    widths = sum(_ffn_width(model, layer) for layer in range(layers))
    routers = sum(
        moe.num_experts
        for layer in range(layers)
        if (moe := model.experts_on(layer)) is not None
    )
    further = model.num_mtp_layers * 2 * model.hidden_size
    heads = (1 + model.num_mtp_layers) * model.vocabulary
    return layers * attention_parameters(model) + model.hidden_size * (
        matrices * widths + routers + further + heads
    )


def attention_parameters(model: ModelConfig) -> int:
    """Of the products of one layer's attention."""
    hidden = model.hidden_size
    heads = model.num_attention_heads
    mla = model.mla
    if mla is None:
        return hidden * 2 * (heads + model.kv_heads) * model.head_width
    queries = heads * mla.qk_head_dim
    of_queries = (
        hidden * queries
        if mla.q_lora_rank is None
        else mla.q_lora_rank * (hidden + queries)
    )
    down = hidden * (mla.kv_lora_rank + mla.qk_rope_head_dim)
    return (
        of_queries
        + down
        + heads
        * (
            mla.kv_lora_rank * (mla.qk_nope_head_dim + mla.v_head_dim)
            + mla.v_head_dim * hidden
        )
    )


def _ffn_width(model: ModelConfig, layer: int) -> int:
    """Of all the MLPs that a token goes through in a layer."""
    moe = model.experts_on(layer)
    if moe is None:
        return model.ffn_width
    return moe.top_k * model.expert_width + (moe.shared_expert_ffn_hidden_size or 0)


def flops_per_token(model: ModelConfig, seq_length: int) -> int:
    """Forward and backward."""
    layers = model.num_layers + model.num_mtp_layers
    attention = (
        6
        * layers
        * model.num_attention_heads
        * (model.head_width + model.value_width)
        * seq_length
    )
    return 6 * matmul_parameters(model) + attention
