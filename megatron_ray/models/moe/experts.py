"""Computes the MLPs of many experts at once.

Owns: its maths. Must not know: ranks, dispatch.

Shapes: R rows sorted by expert, H hidden.
"""

from torch import Tensor, nn

from megatron_ray.config.model import ModelConfig
from megatron_ray.models.layers import LayerFactory
from megatron_ray.models.mlp import gated_activation, plain_activation
from megatron_ray.ops.matmul import Counts
from megatron_ray.sharding.model_specs import gated_experts_spec, plain_experts_spec


class GatedExperts(nn.Module):
    """down(activation(gate(x)) * up(x)) with the matrices of each row's expert."""

    def __init__(self, config: ModelConfig, layers: LayerFactory, num_experts: int) -> None:
        super().__init__()
        self.activation = gated_activation(config)
        spec = gated_experts_spec(config, num_experts)
        # One product for both, since they read the same rows.
        self.gate_up = layers.expert_column(spec.gate_up)
        self.down = layers.expert_row(spec.down)

    def forward(self, rows_RH: Tensor, counts: Counts) -> Tensor:
        """Returns [R, H]; `counts` are the rows of each expert here."""
        output: Tensor = self.down(self.activation(self.gate_up(rows_RH, counts)), counts)
        return output


class PlainExperts(nn.Module):
    """down(gelu(up(x))) with the matrices of each row's expert."""

    def __init__(self, config: ModelConfig, layers: LayerFactory, num_experts: int) -> None:
        super().__init__()
        self.activation = plain_activation(config)
        spec = plain_experts_spec(config, num_experts)
        self.up = layers.expert_column(spec.up)
        self.down = layers.expert_row(spec.down)

    def forward(self, rows_RH: Tensor, counts: Counts) -> Tensor:
        """Returns [R, H]; `counts` are the rows of each expert here."""
        output: Tensor = self.down(self.activation(self.up(rows_RH, counts)), counts)
        return output
