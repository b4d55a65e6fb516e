"""Defines the shape of a mixture of experts: number, routing and load balancing.

Owns: architecture only. Names and defaults are Megatron-LM's where it has them.

Must not know: parallelism, devices.
"""

from typing import Literal

from pydantic import Field

from megatron_ray.config.base import Config


class LayerPattern(Config):
    """Selects the layers with experts: those whose index is a multiple of `every`."""

    every: int = Field(default=1, ge=1, le=1024)
    """1 for all layers, 2 for every second layer beginning with the first, and so on."""


class MoEConfig(Config):
    """Experts instead of a layer's MLP; a router sends each token to `top_k` of them."""

    num_experts: int = Field(ge=1, le=4096)
    """Number of experts per layer."""
    top_k: int = Field(default=2, ge=1, le=64)
    """Number of experts that each token is routed to."""
    ffn_hidden_size: int | None = Field(default=None, ge=8, le=1 << 20)
    """Width inside an expert. Default: the model's ffn_hidden_size."""
    layer_pattern: LayerPattern | list[Literal[0, 1]] = LayerPattern()
    """Which layers have experts: `{every: n}` for layers 0, n, 2n ..., or a list with
    one number per layer, 1 for experts and 0 for a plain MLP. Default: all layers."""
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    """Function that turns the router's logits into scores (DeepSeek-V3: sigmoid)."""
    pre_softmax: bool = False
    """Applies softmax to all experts before the top k are chosen. Default: to the
    chosen experts only, so that their weights sum to one (Mixtral)."""
    scaling_factor: float = Field(default=1.0, gt=0)
    """Factor on the weights of the chosen experts."""
    num_groups: int | None = Field(default=None, ge=1, le=1024)
    """Number of groups of experts for group-limited routing (DeepSeek-V2). Requires
    `group_top_k`. Default: no groups, every expert may be chosen."""
    group_top_k: int | None = Field(default=None, ge=1, le=64)
    """Number of groups that a token may choose experts from. Groups are ranked by the
    sum of their best scores."""
    scores_per_group: int | None = Field(default=None, ge=1, le=64)
    """Number of a group's best scores whose sum ranks it: 1 in DeepSeek-V2, 2 in
    DeepSeek-V3. Default: top_k / group_top_k, as in Megatron-LM."""
    aux_loss_coeff: float = Field(default=0.0, ge=0)
    """Weight of the load-balancing loss; 0 disables it. Its gradient is added to that of
    the loss, and it is reported separately."""
    aux_loss: Literal["aux_loss", "seq_aux_loss"] = "aux_loss"
    """What the load-balancing loss balances: `aux_loss` all tokens of a microbatch
    (Switch Transformer), `seq_aux_loss` each of its sequences (DeepSeek-V2)."""
    z_loss_coeff: float = Field(default=0.0, ge=0)
    """Weight of the mean squared logsumexp of the router's logits, which keeps them
    small (ST-MoE suggests 1e-3); 0 disables it."""
    expert_bias: bool = False
    """Balances the load without a loss (DeepSeek-V3): experts are chosen by score +
    bias, and every step lowers the bias of experts that got more tokens than the mean
    and raises that of the others. Requires score_function=sigmoid."""
    bias_update_rate: float = Field(default=1e-3, gt=0, le=1)
    """Change of an expert's bias per step, for `expert_bias`."""
    capacity_factor: float | None = Field(default=None, gt=0)
    """Limits each expert to ceil(tokens x top_k / num_experts x capacity_factor) of a
    rank's tokens per microbatch; tokens beyond that are dropped, which means that this
    expert adds nothing to them. Default: no limit, no token is dropped."""
    pad_to_capacity: bool = False
    """Pads every expert's tokens with zeros up to its capacity, so that no tensor shape
    depends on the data. Requires capacity_factor."""
    drop_policy: Literal["probs", "position"] = "probs"
    """Which tokens are kept when an expert is at its capacity: `probs` those with the
    largest weights, `position` the first of the sequence."""
    shared_expert_ffn_hidden_size: int | None = Field(default=None, ge=8, le=1 << 20)
    """Width of a shared expert, which processes every token. Default: no shared
    expert."""

    @property
    def group_score_count(self) -> int:
        """Number of a group's best scores whose sum ranks it, resolved."""
        return self.scores_per_group or self.top_k // (self.group_top_k or 1)

    @property
    def balancing_loss(self) -> str:
        """Name under which the load-balancing loss is reported."""
        if self.aux_loss == "aux_loss":
            return "load_balancing_loss"
        return "seq_load_balancing_loss"

    def on_layer(self, index: int) -> bool:
        """Returns whether a layer (counted from 0) has experts."""
        if isinstance(self.layer_pattern, LayerPattern):
            return index % self.layer_pattern.every == 0
        return bool(self.layer_pattern[index])
