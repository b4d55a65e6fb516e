"""Defines one transformer block.

Owns: where norms and residuals are. Must not know: ranks, groups.

Shapes: T tokens, H hidden.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from megatron_ray.config.model import ModelConfig
from megatron_ray.models.attention import Attention, KeyValueCache
from megatron_ray.models.forward_context import ForwardContext
from megatron_ray.models.latent_attention import LatentAttention
from megatron_ray.models.layers import LayerFactory
from megatron_ray.models.mlp import GatedMLP, PlainMLP, make_mlp
from megatron_ray.models.moe.layer import MoE
from megatron_ray.ops.dtypes import add_residual_
from megatron_ray.sharding.model_specs import block_spec

RunBlocks = Callable[[Iterable[nn.Module], Tensor, ForwardContext], Tensor]
"""Runs blocks one after another on hidden states [T, H]."""


class Block(nn.Module):
    """hidden + attention(norm(hidden)), then hidden + mlp(norm(hidden)).

    The MLP may be a mixture of experts. Each residual is added inside the last product
    of its half, which saves a pass over the hidden states. With dropout, or with a norm or
    a factor on what is added, it is added after the product instead.
    """

    def __init__(self, config: ModelConfig, layers: LayerFactory, index: int) -> None:
        super().__init__()
        spec = block_spec(config, index)
        self.attention_norm = layers.norm(spec.attention_norm)
        self.attention = make_attention(config, layers, index)
        self.attention_output_norm: nn.Module | None = None
        if spec.attention_output_norm is not None:
            self.attention_output_norm = layers.norm(spec.attention_output_norm)
        self.mlp_norm = layers.norm(spec.mlp_norm)
        self.mlp: GatedMLP | PlainMLP | None = None
        self.moe: MoE | None = None
        moe = config.experts_on(index)
        if moe is None:
            self.mlp = make_mlp(config, layers, config.ffn_width)
        else:
            self.moe = MoE(config, moe, layers, index)
        self.mlp_output_norm: nn.Module | None = None
        if spec.mlp_output_norm is not None:
            self.mlp_output_norm = layers.norm(spec.mlp_output_norm)
        self.adds_after_products = config.peri_norm or config.residual_factor != 1.0
        self.residual_factor = config.residual_factor
        self.attention_dropout = layers.hidden_dropout(f"layers.{index}.attention")
        self.mlp_dropout = layers.hidden_dropout(f"layers.{index}.mlp")

    def forward(
        self,
        hidden_TH: Tensor,
        context: ForwardContext,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Returns the hidden states [T, H] after this block.

        `cache` holds the keys and values of earlier tokens, in generation.
        """
        has_dropout = self.attention_dropout is not None and context.mode.is_training
        if has_dropout or self.adds_after_products:
            return self._forward_and_add(hidden_TH, context, cache)
        # Each half uses its input twice: normalised, and as the residual.
        hidden_TH = self.attention(
            self.attention_norm(hidden_TH), hidden_TH, context, cache
        )
        return self._feed_forward(self.mlp_norm(hidden_TH), hidden_TH, context)

    def _feed_forward(
        self, x_TH: Tensor, residual_TH: Tensor | None, context: ForwardContext
    ) -> Tensor:
        if self.moe is not None:
            output: Tensor = self.moe(x_TH, residual_TH, context)
            return output
        assert self.mlp is not None
        # A norm of the output keeps it for its backward pass.
        is_needed = context.is_output_needed or self.mlp_output_norm is not None
        expanded: Tensor = self.mlp(x_TH, residual_TH, is_output_needed=is_needed)
        return expanded

    def _forward_and_add(
        self, hidden_TH: Tensor, context: ForwardContext, cache: KeyValueCache | None
    ) -> Tensor:
        """Adds each residual after its half, not inside a product."""
        attended = self.attention(self.attention_norm(hidden_TH), None, context, cache)
        if self.attention_output_norm is not None:
            attended = self.attention_output_norm(attended)
        hidden_TH = self._add(hidden_TH, attended, self.attention_dropout, context)
        expanded = self._feed_forward(self.mlp_norm(hidden_TH), None, context)
        if self.mlp_output_norm is not None:
            expanded = self.mlp_output_norm(expanded)
        return self._add(hidden_TH, expanded, self.mlp_dropout, context)

    def _add(
        self,
        hidden_TH: Tensor,
        output_TH: Tensor,
        dropout: nn.Module | None,
        context: ForwardContext,
    ) -> Tensor:
        if dropout is None or not context.mode.is_training:
            return torch.add(hidden_TH, output_TH, alpha=self.residual_factor)
        # Dropout and the residual addition work in place on new results, so the sums need
        # no extra memory.
        dropped: Tensor = dropout(output_TH, context.dropout_sample)
        if self.residual_factor != 1.0:
            dropped = dropped.mul_(self.residual_factor)
        return add_residual_(dropped, hidden_TH)


def make_attention(
    config: ModelConfig, layers: LayerFactory, index: int
) -> Attention | LatentAttention:
    """Returns the attention module of a layer."""
    path = f"layers.{index}.attention"
    if config.mla is not None:
        return LatentAttention(config, config.mla, layers, path)
    return Attention(config, layers, path, config.window_on(index))


def run_sequentially(
    blocks: Iterable[nn.Module], hidden_TH: Tensor, context: ForwardContext
) -> Tensor:
    """Runs blocks one after another and keeps all activations."""
    for block in blocks:
        hidden_TH = block(hidden_TH, context, None)
    return hidden_TH
