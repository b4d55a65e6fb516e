"""The feed-forward half of a block that has experts.

Owns: the order route, dispatch, compute, combine. Must not know: ranks, groups.

Shapes: T tokens, E experts, K experts of a token, H hidden.
"""

import torch
from torch import Tensor, nn

from megatron_ray.config.model import ModelConfig
from megatron_ray.config.moe import MoEConfig
from megatron_ray.expert_parallel.dispatch import Capacity
from megatron_ray.models.attention import ForwardContext
from megatron_ray.models.layers import Layers
from megatron_ray.models.mlp import make_mlp
from megatron_ray.models.moe import router
from megatron_ray.models.moe.experts import GatedExperts, PlainExperts
from megatron_ray.sharding.model_specs import moe_spec


class MoE(nn.Module):
    """x -> residual (if given) + sum over a token's experts of weight x expert(x), + a
    shared expert where there is one.
    """

    def __init__(
        self, config: ModelConfig, moe: MoEConfig, layers: Layers, index: int
    ) -> None:
        super().__init__()
        self.moe = moe
        self.index = index
        self.layers = layers
        self.router = layers.router(moe_spec(config, moe).router)
        self.expert_bias = (
            layers.expert_bias(moe.num_experts, moe.bias_update_rate)
            if moe.expert_bias
            else None
        )
        kind = GatedExperts if config.gated else PlainExperts
        self.experts = kind(config, layers, moe.num_experts)
        shared = moe.shared_expert_ffn_hidden_size
        self.shared = make_mlp(config, layers, shared) if shared is not None else None
        self.dispatcher = layers.dispatcher(moe.num_experts)
        weights = config.aux_losses
        self.balancing_loss, self.z_loss = (
            layers.aux_loss(kind, weights[kind], is_per_rank=True)
            if kind in weights
            else None
            for kind in (moe.balancing_loss, "z_loss")
        )

    def forward(
        self, x_TH: Tensor, residual_TH: Tensor | None, positions: ForwardContext
    ) -> Tensor:
        experts, weights = self._route(self.router(x_TH), positions)
        # A generated token must not depend on what else is in its batch, so only a
        # model that is trained sends tokens away.
        most = router.capacity(self.moe, len(experts)) if self.training else None
        if most is not None:
            experts, weights = router.limit(self.moe, experts, weights, most)
        room = Capacity(
            dropless=most is None, rows=most if self.moe.pad_to_capacity else None
        )
        dispatched = self.dispatcher.dispatch(x_TH, experts, room)
        if self.shared is not None:
            residual_TH = self.shared(x_TH, residual_TH)
        outputs: Tensor = self.experts(dispatched.rows_RH, dispatched.counts)
        combined = dispatched.combine(outputs, weights)
        return combined if residual_TH is None else residual_TH + combined

    def _route(self, logits_TE: Tensor, positions: ForwardContext) -> tuple[Tensor, Tensor]:
        given = positions.routing_replay
        if given is not None:
            given = self.layers.local_rows(given[:, self.index])
        bias = self.expert_bias.value if self.expert_bias is not None else None
        experts, weights = router.choose(self.moe, logits_TE, bias, given)
        if positions.on_route is not None:
            positions.on_route(self.index, experts)
        if torch.is_grad_enabled():
            weights = self._balanced(logits_TE, experts, weights, positions)
        return experts, weights

    def _balanced(
        self,
        logits_TE: Tensor,
        experts_TK: Tensor,
        weights_TK: Tensor,
        positions: ForwardContext,
    ) -> Tensor:
        """The weights with the gradients of the balancing losses attached; a bias hears
        who was chosen.
        """
        moe = self.moe
        if self.expert_bias is not None:
            everything = torch.zeros_like(experts_TK[:, 0])
            self.expert_bias.count(
                router.count_tokens(experts_TK, moe.num_experts, everything, 1)[0]
            )
        if self.balancing_loss is not None:
            sequence, count = self._sequences(positions, len(experts_TK), experts_TK.device)
            tokens = self.layers.sum_over_tokens(
                router.count_tokens(experts_TK, moe.num_experts, sequence, count)
            )
            weights_TK = self.balancing_loss(
                weights_TK, router.aux_loss(moe, logits_TE, tokens, sequence)
            )
        if self.z_loss is not None:
            weights_TK = self.z_loss(weights_TK, router.z_loss(moe, logits_TE))
        return weights_TK

    def _sequences(
        self, positions: ForwardContext, num_tokens: int, device: torch.device
    ) -> tuple[Tensor, int]:
        """(which sequence each of these tokens is balanced with, how many there are)."""
        if self.moe.aux_loss == "aux_loss":
            return torch.zeros(num_tokens, dtype=torch.int64, device=device), 1
        which = torch.arange(positions.batch, device=device).repeat_interleave(
            positions.sequence, output_size=positions.batch * positions.sequence
        )
        return self.layers.local_rows(which), positions.batch
