"""Defines a multi-token prediction layer (DeepSeek-V3, section 2.2).

Owns: combining the next token's embedding with the previous hidden state. Must not
know: ranks, groups, losses.

As published: embedding first and hidden state second, then a block, then a norm. Hidden
states are taken after the norm before the head, also between MTP layers (as in
Megatron-LM, SGLang and transformers). Embedding and head are shared with the model.

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

    The model's head computes the logits.
    """

    def __init__(self, config: ModelConfig, layers: LayerFactory, depth: int) -> None:
        super().__init__()
        spec = mtp_spec(config, depth)
        self.embedding_norm = layers.norm(spec.embedding_norm)
        self.hidden_norm = layers.norm(spec.hidden_norm)
        self.final_norm = layers.norm(spec.final_norm)
        self.embedding_dropout = layers.hidden_dropout(f"mtp.{depth}.embedding")
        self.projection = layers.replicated(spec.projection)
        # Blocks of MTP layers continue the numbering of the model's blocks.
        self.block = Block(config, layers, config.num_layers + depth)
        kind = f"mtp_{depth + 1}_loss"
        # A loss of weight 0 is not reported, so its divisor is arbitrary.
        divisor = config.aux_losses.get(kind, 1.0)
        self.loss = layers.aux_loss(kind, divisor, is_per_rank=False)

    def forward(
        self,
        hidden_TH: Tensor,
        embedded_TH: Tensor,
        context: ForwardContext,
        run_blocks: RunBlocks,
    ) -> Tensor:
        """Returns hidden states that predict the token after that of `hidden_TH`.

        `embedded_TH` are the embeddings of the tokens that `hidden_TH` predicts;
        `run_blocks` is the model's function that runs blocks.
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
