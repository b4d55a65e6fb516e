"""Describes how the operands of a linear layer's products are quantized.

Must not know: where scales come from, products, what a spec calls a recipe.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from megatron_ray.ops.fp8.kernels import Kernel
from megatron_ray.ops.fp8.quantize import E4M3, Block

Role = Literal["inputs", "weight", "grad"]
"""An operand; `grad` is the gradient of the outputs."""
ROLES: tuple[Role, ...] = ("inputs", "weight", "grad")


@dataclass(frozen=True)
class Recipe:
    """Types and blocks of operands, and what multiplies them."""

    grad_dtype: torch.dtype
    kernel: Kernel
    block: Block | None = None
    """Elements that share a scale; None for the whole tensor."""
    weight_block: Block | None = None
    """The same in weights."""

    def dtype_of(self, role: Role) -> torch.dtype:
        """Returns the type in which an operand is quantized."""
        return self.grad_dtype if role == "grad" else E4M3

    def block_of(self, role: Role) -> Block | None:
        """Returns the block of an operand."""
        return self.weight_block if role == "weight" else self.block
