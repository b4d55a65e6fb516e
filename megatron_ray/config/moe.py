"""Shape of a mixture of experts: how many, who gets which token, what keeps them
balanced.

Owns: architecture only.

Names and defaults are Megatron-LM's where it has them. Must not know: parallelism,
devices.
"""

from typing import Literal

from pydantic import Field

from megatron_ray.config.base import Config


class LayerPattern(Config):
    """Which layers have experts: layer i has where i is a multiple of `every`."""

    every: int = Field(default=1, ge=1, le=1024)
    """1: all layers, 2: every second one beginning with the first."""


class MoEConfig(Config):
    """Experts in the place of a layer's MLP; each token goes to `top_k` of them."""

    num_experts: int = Field(ge=1, le=4096)
    """Experts of a layer."""
    top_k: int = Field(default=2, ge=1, le=64)
    """Experts that a token goes to."""
    ffn_hidden_size: int | None = Field(default=None, ge=8, le=1 << 20)
    """Width inside an expert; the model's ffn_hidden_size when not given."""
    layer_pattern: LayerPattern | list[Literal[0, 1]] = LayerPattern()
    """`{every: n}`: layers 0, n, 2n ... have experts; or one number per layer, 1 for
    experts and 0 for a plain MLP."""
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    """Of the router's logits."""
    pre_softmax: bool = False
    """Softmax over all experts before the choice; otherwise over the chosen ones only,
    so that their weights add up to one."""
    scaling_factor: float = Field(default=1.0, gt=0)
    """Multiplies the weights of the chosen experts."""
    num_groups: int | None = Field(default=None, ge=1, le=1024)
    """Groups of experts, for a choice that is limited to `group_top_k` of them
    (DeepSeek-V2)."""
    group_top_k: int | None = Field(default=None, ge=1, le=64)
    """Groups that a token may choose from; they are ranked by the sum of their best
    top_k / group_top_k scores."""
    aux_loss_coeff: float = Field(default=0.0, ge=0)
    """Weight of the load-balancing loss; 0 for none. Its gradient is added; it is
    reported apart from the loss."""
    aux_loss: Literal["aux_loss", "seq_aux_loss"] = "aux_loss"
    """Balance over the tokens of a microbatch (Switch Transformer), or over each of its
    sequences (DeepSeek-V2)."""
    z_loss_coeff: float = Field(default=0.0, ge=0)
    """Weight of the mean squared logsumexp of the router's logits (ST-MoE suggests
    1e-3); 0 for none."""
    expert_bias: bool = False
    """Balances without a loss (DeepSeek-V3): experts are chosen by score + bias, and
    each step moves the bias of experts that got more tokens than the mean down and that
    of the others up. Needs sigmoid scores."""
    bias_update_rate: float = Field(default=1e-3, gt=0, le=1)
    """What a step moves such a bias by."""
    capacity_factor: float | None = Field(default=None, gt=0)
    """An expert takes at most ceil(tokens x top_k / num_experts x capacity_factor) of
    each rank's tokens of a microbatch and the rest pass it by; no limit when not given.
    """
    pad_to_capacity: bool = False
    """Every expert gets exactly that many rows, filled up with zeros: no shape depends
    on the data."""
    drop_policy: Literal["probs", "position"] = "probs"
    """Who stays when an expert is full: the tokens with the largest weights, or those
    that come first."""
    shared_expert_ffn_hidden_size: int | None = Field(default=None, ge=8, le=1 << 20)
    """Width of an expert that every token goes to besides; none when not given."""

    @property
    def balancing_loss(self) -> str:
        """What the load-balancing loss is reported as."""
        return (
            "load_balancing_loss"
            if self.aux_loss == "aux_loss"
            else "seq_load_balancing_loss"
        )

    def on_layer(self, index: int) -> bool:
        """Whether a layer has experts."""
        if isinstance(self.layer_pattern, LayerPattern):
            return index % self.layer_pattern.every == 0
        return bool(self.layer_pattern[index])
