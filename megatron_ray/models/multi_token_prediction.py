"""Predicts one token more into the future (DeepSeek-V3, section 2.2).

Owns: how a layer joins the next token's embedding with the hidden state before it. Must
not know: ranks, groups, losses.

As published: embedding first and hidden state second, a block, a norm of its own.
Hidden states are those after the norm before the head, also from one such layer to the
next (so Megatron-LM, SGLang and transformers). Embedding and head are the model's.

Shapes: T tokens, H hidden.
"""

import torch
from torch import Tensor, nn

from megatron_ray.config.model import ModelConfig
from megatron_ray.models.block import Block, RunBlocks
from megatron_ray.models.forward_context import ForwardContext
from megatron_ray.models.layers import LayerFactory
from megatron_ray.sharding.model_specs import mtp_spec


class MultiTokenPredictionLayer(nn.Module):
    """norm(block(projection [norm(embedding of next token), norm(hidden)])) [T, H].

    The model's head turns it into logits.
    """

    def __init__(self, config: ModelConfig, layers: LayerFactory, depth: int) -> None:
        super().__init__()
        spec = mtp_spec(config, depth)
        self.embedding_norm = layers.norm(spec.embedding_norm)
        self.hidden_norm = layers.norm(spec.hidden_norm)
        self.final_norm = layers.norm(spec.final_norm)
        self.embedding_dropout = layers.hidden_dropout(f"mtp.{depth}.embedding")
        self.projection = layers.replicated(spec.projection)
        # Blocks of MTP layers are numbered on from the last one of the model.
        self.block = Block(config, layers, config.num_layers + depth)
        kind = f"mtp_{depth + 1}_loss"
        # A loss of weight 0 is in no table and is not reported, so its divisor is free.
        divisor = config.aux_losses.get(kind, 1.0)
        self.loss = layers.aux_loss(kind, divisor, is_per_rank=False)

    def forward(
        self,
        hidden_TH: Tensor,
        embedded_TH: Tensor,
        context: ForwardContext,
        run_blocks: RunBlocks,
    ) -> Tensor:
        """Returns the hidden states that predict one token later than `hidden_TH` do.

        `embedded_TH` are the embeddings of the tokens that `hidden_TH` predicts, and
        `run_blocks` is how the model runs blocks.
        """
        if self.embedding_dropout is not None and context.mode.is_training:
            embedded_TH = self.embedding_dropout(embedded_TH, context.dropout_sample)
        # Embedding first: the order of the published projection's columns.
        joined = torch.cat(
            [self.embedding_norm(embedded_TH), self.hidden_norm(hidden_TH)], dim=-1
        )
        output: Tensor = self.final_norm(
            run_blocks([self.block], self.projection(joined), context)
        )
        return output
