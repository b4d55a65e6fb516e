"""A layer that predicts one token more into the future (DeepSeek-V3, section 2.2).

Owns: how it joins a token with what came before.

As published: embedding first and hidden state second, a block, a norm of its own;
hidden states are those after the norm before the head, also from one such layer to the
next (so Megatron-LM, SGLang and transformers). Embedding and head are the model's. Must
not know: ranks, groups, losses.

Shapes: T tokens, H hidden.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from megatron_ray.config.model import ModelConfig
from megatron_ray.models.attention import ForwardContext
from megatron_ray.models.block import Block
from megatron_ray.models.layers import Layers
from megatron_ray.sharding.model_specs import mtp_spec


class MultiTokenPredictionLayer(nn.Module):
    """norm(block(projection [norm(embedding of the next token), norm(hidden)])) [T, H],
    for the head.
    """

    def __init__(self, config: ModelConfig, layers: Layers, depth: int) -> None:
        super().__init__()
        spec = mtp_spec(config, depth)
        self.embedding_norm = layers.norm(spec.embedding_norm)
        self.hidden_norm = layers.norm(spec.hidden_norm)
        self.final_norm = layers.norm(spec.final_norm)
        self.embedding_dropout = layers.hidden_dropout(f"mtp.{depth}.embedding")
        self.projection = layers.replicated(spec.projection)
        self.block = Block(config, layers, config.num_layers + depth)
        kind = f"mtp_{depth + 1}_loss"
        divisor = config.aux_losses.get(
            kind, 1.0
        )  # a loss of weight 0 is not reported: nobody takes it
        self.loss = layers.aux_loss(kind, divisor, is_per_rank=False)

    def forward(
        self,
        hidden_TH: Tensor,
        embedded_TH: Tensor,
        positions: ForwardContext,
        through: Callable[[Iterable[nn.Module], Tensor, ForwardContext], Tensor],
    ) -> Tensor:
        """`through`: how activations go through blocks."""
        if self.embedding_dropout is not None and positions.first_sample is not None:
            embedded_TH = self.embedding_dropout(embedded_TH, positions.first_sample)
        joined = torch.cat(
            [self.embedding_norm(embedded_TH), self.hidden_norm(hidden_TH)], dim=-1
        )
        output: Tensor = self.final_norm(
            through([self.block], self.projection(joined), positions)
        )
        return output
