"""Defines the feed-forward half of a block.

Owns: its maths. Must not know: ranks, groups.

Shapes: T tokens, F inner width, H hidden.
"""

from typing import Any

import torch
from torch import Tensor, nn

from megatron_ray.config.model import ModelConfig
from megatron_ray.models.layers import LayerFactory
from megatron_ray.ops.autograd import AutogradFunction
from megatron_ray.ops.differentiable_op import DifferentiableOp
from megatron_ray.sharding.model_specs import gated_mlp_spec, plain_mlp_spec


class GatedMLP(nn.Module):
    """x -> residual + down(activation(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, layers: LayerFactory, width: int) -> None:
        super().__init__()
        self.activation = gated_activation(config)
        spec = gated_mlp_spec(config, width)
        # One product for both, since they read the same input.
        self.gate_up = layers.column(spec.gate_up)
        self.down = layers.row(spec.down)

    def forward(
        self, x_TH: Tensor, residual_TH: Tensor | None, *, is_output_needed: bool = True
    ) -> Tensor:
        """Returns residual (unless None) + MLP, [T, H].

        Its values are left undefined when `is_output_needed` is False.
        """
        output: Tensor = self.down(
            self.activation(self.gate_up(x_TH)),
            residual_TH,
            is_output_needed=is_output_needed,
        )
        return output


class PlainMLP(nn.Module):
    """x -> residual + down(gelu(up(x)))."""

    def __init__(self, config: ModelConfig, layers: LayerFactory, width: int) -> None:
        super().__init__()
        self.activation = plain_activation(config)
        spec = plain_mlp_spec(config, width)
        self.up = layers.column(spec.up)
        self.down = layers.row(spec.down)

    def forward(
        self, x_TH: Tensor, residual_TH: Tensor | None, *, is_output_needed: bool = True
    ) -> Tensor:
        """Returns residual (unless None) + MLP, [T, H].

        Its values are left undefined when `is_output_needed` is False.
        """
        output: Tensor = self.down(
            self.activation(self.up(x_TH)), residual_TH, is_output_needed=is_output_needed
        )
        return output


def make_mlp(config: ModelConfig, layers: LayerFactory, width: int) -> GatedMLP | PlainMLP:
    """Returns the model's kind of MLP with this inner width."""
    if config.gated:
        return GatedMLP(config, layers, width)
    return PlainMLP(config, layers, width)


class GatedActivation(nn.Module):
    """activation(gate) * up of a fused [T, 2F] whose first half is the gate."""

    def __init__(self, kernel: DifferentiableOp) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, gate_up: Tensor) -> Tensor:
        """Returns [T, F]."""
        return _Gated.apply(gate_up, self.kernel)


def gated_activation(config: ModelConfig) -> GatedActivation:
    """Returns the model's gated activation: silu, or tanh-approximated GELU."""
    if config.activation == "geglu_tanh":
        return GatedActivation(GEGLU_TANH)
    return GatedActivation(SWIGLU)


def plain_activation(config: ModelConfig) -> nn.GELU:
    """Returns the model's activation without a gate: GELU, exact or approximated."""
    if config.activation == "gelu_tanh":
        return nn.GELU(approximate="tanh")
    return nn.GELU(approximate="none")


def _swiglu(gate_up: Tensor) -> Tensor:
    """Returns silu(gate) * up, [T, 2F] -> [T, F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return nn.functional.silu(gate).mul_(up)


def _swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """Returns the gradient of the fused [T, 2F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    # Both halves are written into one tensor, which saves a concatenation.
    grad_gate_up = torch.empty_like(gate_up)
    grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
    # The activation is recomputed, because saving it would cost another [T, F].
    torch.mul(grad, nn.functional.silu(gate), out=grad_up)
    # The gate's gradient is that of silu, weighted by the other half.
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
    return grad_gate_up


def _geglu_tanh(gate_up: Tensor) -> Tensor:
    """Returns gelu(gate) * up, [T, 2F] -> [T, F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return nn.functional.gelu(gate, approximate="tanh").mul_(up)


def _geglu_tanh_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """Returns the gradient of the fused [T, 2F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    # Both halves are written into one tensor, which saves a concatenation.
    grad_gate_up = torch.empty_like(gate_up)
    grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
    torch.mul(grad, nn.functional.gelu(gate, approximate="tanh"), out=grad_up)
    torch.ops.aten.gelu_backward.grad_input(
        grad * up, gate, approximate="tanh", grad_input=grad_gate
    )
    return grad_gate_up


SWIGLU = DifferentiableOp(_swiglu, _swiglu_backward)
GEGLU_TANH = DifferentiableOp(_geglu_tanh, _geglu_tanh_backward)


class _Gated(AutogradFunction[Tensor]):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, kernel: DifferentiableOp) -> Tensor:
        # Saves only the fused product, neither the activation nor the product of the
        # halves.
        ctx.save_for_backward(gate_up)
        ctx.kernel = kernel
        output: Tensor = kernel.forward(gate_up)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        return ctx.kernel.backward(grad, gate_up), None
