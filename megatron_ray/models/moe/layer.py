"""Defines the feed-forward half of a block with experts.

Owns: the steps route, dispatch, compute, combine. Must not know: ranks, groups.

Shapes: T tokens, E experts, K experts of a token, H hidden.
"""

import torch
from torch import Tensor, nn

from megatron_ray.config.architecture.moe import MoEConfig
from megatron_ray.config.model import ModelConfig
from megatron_ray.expert_parallel.dispatch import Capacity
from megatron_ray.expert_parallel.layers import ExpertBias
from megatron_ray.models.aux_loss import AuxLoss
from megatron_ray.models.forward_context import ForwardContext
from megatron_ray.models.layers import LayerFactory
from megatron_ray.models.mlp import GatedMLP, PlainMLP, make_mlp
from megatron_ray.models.moe import router
from megatron_ray.models.moe.experts import GatedExperts, PlainExperts
from megatron_ray.sharding.model_specs import moe_spec


class MoE(nn.Module):
    """x -> residual + sum over a token's experts of weight x expert(x).

    The output of a shared expert, if any, is added.
    """

    def __init__(
        self, config: ModelConfig, moe: MoEConfig, layers: LayerFactory, index: int
    ) -> None:
        super().__init__()
        self.moe = moe
        self.index = index
        self.layers = layers
        self.router = layers.router(moe_spec(config, moe).router)
        self.expert_bias: ExpertBias | None = None
        if moe.expert_bias:
            self.expert_bias = layers.expert_bias(moe.num_experts, moe.bias_update_rate)
        self.experts: GatedExperts | PlainExperts
        if config.gated:
            self.experts = GatedExperts(config, layers, moe.num_experts)
        else:
            self.experts = PlainExperts(config, layers, moe.num_experts)
        self.shared: GatedMLP | PlainMLP | None = None
        if moe.shared_expert_ffn_hidden_size is not None:
            self.shared = make_mlp(config, layers, moe.shared_expert_ffn_hidden_size)
        self.dispatcher = layers.dispatcher(moe.num_experts)
        self.balancing_loss = _aux_loss(config, layers, moe.balancing_loss)
        self.z_loss = _aux_loss(config, layers, "z_loss")

    def forward(
        self, x_TH: Tensor, residual_TH: Tensor | None, context: ForwardContext
    ) -> Tensor:
        """Returns residual (unless None) + experts, [T, H]."""
        experts, weights = self._route(self.router(x_TH), context)
        # Tokens are dropped in training only: in other passes results must not depend on
        # the rest of the batch.
        max_rows = None
        if context.mode.is_training:
            max_rows = router.capacity(self.moe, len(experts))
        capacity = Capacity()
        if max_rows is not None:
            experts, weights = router.limit(self.moe, experts, weights, max_rows)
            padded_rows = max_rows if self.moe.pad_to_capacity else None
            capacity = Capacity(dropless=False, rows_per_expert=padded_rows)
        dispatched = self.dispatcher.dispatch(x_TH, experts, capacity)
        # The shared expert adds the residual inside its last product.
        if self.shared is not None:
            residual_TH = self.shared(x_TH, residual_TH)
        outputs: Tensor = self.experts(dispatched.rows_RH, dispatched.counts)
        combined = dispatched.combine(outputs, weights)
        if residual_TH is None:
            return combined
        return residual_TH + combined

    def _route(self, logits_TE: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """Returns (experts [T, K], weights [T, K])."""
        replayed_TK = None
        if context.routing_replay is not None:
            # The replay covers whole sequences, the router only this rank's tokens.
            replayed_TK = self.layers.local_rows(context.routing_replay[:, self.index])
        bias = None
        if self.expert_bias is not None:
            bias = self.expert_bias.value
        experts, weights = router.choose(self.moe, logits_TE, bias, replayed_TK)
        if context.on_route is not None and context.mode.is_first_run:
            context.on_route(self.index, experts)
        # Losses are attached to the weights, by which every token's output is multiplied.
        if context.mode.attaches_losses:
            self._count_tokens(experts)
            weights = self._attach_losses(logits_TE, experts, weights, context)
        return experts, weights

    def _count_tokens(self, experts_TK: Tensor) -> None:
        """Counts the tokens of each expert for the update of its balancing bias."""
        if self.expert_bias is None:
            return
        # The bias balances all tokens of a step, independent of sequences.
        single_sequence = torch.zeros_like(experts_TK[:, 0])
        counts = router.count_tokens(experts_TK, self.moe.num_experts, single_sequence, 1)
        self.expert_bias.count(counts[0])

    def _attach_losses(
        self,
        logits_TE: Tensor,
        experts_TK: Tensor,
        weights_TK: Tensor,
        context: ForwardContext,
    ) -> Tensor:
        """Returns the weights with the gradients of the auxiliary losses attached."""
        moe = self.moe
        if self.balancing_loss is not None:
            sequence, num_sequences = self._sequences(
                context, len(experts_TK), experts_TK.device
            )
            counts = router.count_tokens(
                experts_TK, moe.num_experts, sequence, num_sequences
            )
            # Balancing covers all tokens of a microbatch, on all ranks.
            tokens = self.layers.sum_over_tokens(counts)
            weights_TK = self.balancing_loss(
                weights_TK, router.aux_loss(moe, logits_TE, tokens, sequence)
            )
        if self.z_loss is not None:
            weights_TK = self.z_loss(weights_TK, router.z_loss(moe, logits_TE))
        return weights_TK

    def _sequences(
        self, context: ForwardContext, num_tokens: int, device: torch.device
    ) -> tuple[Tensor, int]:
        """Returns (index of each token's sequence for balancing, number of sequences)."""
        # `aux_loss` balances over the whole microbatch like a single sequence.
        if self.moe.aux_loss == "aux_loss":
            return torch.zeros(num_tokens, dtype=torch.int64, device=device), 1
        sequence_T = torch.arange(context.batch_size, device=device).repeat_interleave(
            context.seq_length, output_size=context.batch_size * context.seq_length
        )
        return self.layers.local_rows(sequence_T), context.batch_size


def _aux_loss(config: ModelConfig, layers: LayerFactory, kind: str) -> AuxLoss | None:
    """Returns the loss of one layer; None if the model lacks this kind."""
    weights = config.aux_losses
    if kind not in weights:
        return None
    return layers.aux_loss(kind, weights[kind], is_per_rank=True)
