"""Computes what experts do with their tokens: an MLP, for many experts at once.

Owns: its maths. Must not know: ranks, where the rows came from.

Shapes: R rows that lie expert by expert, H hidden.
"""

from torch import Tensor, nn

from megatron_ray.config.model import ModelConfig
from megatron_ray.models.layers import Layers
from megatron_ray.models.mlp import gated_activation, plain_activation
from megatron_ray.ops.matmul import Counts


class GatedExperts(nn.Module):
    """down(activation(gate(x)) * up(x)) with the matrices of each row's expert."""

    def __init__(self, config: ModelConfig, layers: Layers, num_experts: int) -> None:
        super().__init__()
        self.activation = gated_activation(config)
        self.gate_up = layers.expert_column(
            num_experts, config.hidden_size, 2 * config.expert_width
        )
        self.down = layers.expert_row(num_experts, config.expert_width, config.hidden_size)

    def forward(self, rows_RH: Tensor, counts: Counts) -> Tensor:
        """Returns [R, H]; `counts` are the rows of each expert here."""
        output: Tensor = self.down(self.activation(self.gate_up(rows_RH, counts)), counts)
        return output


class PlainExperts(nn.Module):
    """down(gelu(up(x))) with the matrices of each row's expert."""

    def __init__(self, config: ModelConfig, layers: Layers, num_experts: int) -> None:
        super().__init__()
        self.activation = plain_activation(config)
        self.up = layers.expert_column(num_experts, config.hidden_size, config.expert_width)
        self.down = layers.expert_row(num_experts, config.expert_width, config.hidden_size)

    def forward(self, rows_RH: Tensor, counts: Counts) -> Tensor:
        """Returns [R, H]; `counts` are the rows of each expert here."""
        output: Tensor = self.down(self.activation(self.up(rows_RH, counts)), counts)
        return output
