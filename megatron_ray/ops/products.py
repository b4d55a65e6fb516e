"""Defines what a linear layer multiplies with.

A layer has three products, which share operands: the quantized ones of `ops.fp8` share
scales too. So a forward pass asks its layer's `Multiplication` for `Products`, which its
backward pass uses again. Must not know: layers, groups.

Shapes: T tokens, I inputs, O outputs, E experts, R rows sorted by expert.
"""

from typing import Protocol

from torch import Tensor

from megatron_ray.ops import matmul
from megatron_ray.ops.matmul import Counts


class Products(Protocol):
    """The products of one pass through a linear layer."""

    def forward(self, inputs_TI: Tensor, weight_OI: Tensor) -> Tensor:
        """Returns inputs @ weight^T: [T, O]."""
        ...

    def forward_plus(
        self, inputs_TI: Tensor, weight_OI: Tensor, addend_TO: Tensor
    ) -> Tensor:
        """Returns addend + inputs @ weight^T: [T, O]."""
        ...

    def input_grad(self, grad_TO: Tensor, weight_OI: Tensor) -> Tensor:
        """Returns grad @ weight: [T, I]."""
        ...

    def weight_grad(self, grad_TO: Tensor, inputs_TI: Tensor) -> Tensor:
        """Returns grad^T @ inputs: [O, I]."""
        ...

    def accumulate_weight_grad(
        self, main_OI: Tensor, grad_TO: Tensor, inputs_TI: Tensor, *, fresh: bool
    ) -> None:
        """Adds grad^T @ inputs to main, or overwrites it if `fresh`."""
        ...


class GroupedProducts(Protocol):
    """The products of one pass through the experts of a layer."""

    def forward(self, inputs_RI: Tensor, weight_EOI: Tensor, counts: Counts) -> Tensor:
        """Returns each expert's inputs @ its weight^T: [R, O]."""
        ...

    def input_grad(self, grad_RO: Tensor, weight_EOI: Tensor, counts: Counts) -> Tensor:
        """Returns each expert's grad @ its weight: [R, I]."""
        ...

    def weight_grad(
        self, grad_RO: Tensor, inputs_RI: Tensor, counts: Counts, num_experts: int
    ) -> Tensor:
        """Returns each expert's grad^T @ inputs: [E, O, I]; zero for one without rows."""
        ...

    def accumulate_weight_grad(
        self,
        main_EOI: Tensor,
        grad_RO: Tensor,
        inputs_RI: Tensor,
        counts: Counts,
        *,
        fresh: bool,
    ) -> None:
        """Adds each expert's grad^T @ inputs to main, or overwrites it if `fresh`."""
        ...


class Multiplication(Protocol):
    """How a layer multiplies."""

    def begin_pass(self) -> Products:
        """Returns the products of a new forward pass and of its backward pass."""
        ...


class GroupedMultiplication(Protocol):
    """How the experts of a layer multiply."""

    def begin_pass(self) -> GroupedProducts:
        """Returns the products of a new forward pass and of its backward pass."""
        ...


class _Plain:
    """Products in the type of their operands."""

    forward = staticmethod(matmul.forward_product)
    forward_plus = staticmethod(matmul.forward_product_plus)
    input_grad = staticmethod(matmul.input_grad_product)
    weight_grad = staticmethod(matmul.weight_grad_product)
    accumulate_weight_grad = staticmethod(matmul.accumulate_weight_grad)

    def begin_pass(self) -> Products:
        return self


class _PlainGrouped:
    """Products of experts in the type of their operands."""

    forward = staticmethod(matmul.grouped_forward_product)
    input_grad = staticmethod(matmul.grouped_input_grad_product)
    weight_grad = staticmethod(matmul.grouped_weight_grad_product)
    accumulate_weight_grad = staticmethod(matmul.accumulate_grouped_weight_grad)

    def begin_pass(self) -> GroupedProducts:
        return self


PLAIN = _Plain()
PLAIN_GROUPED = _PlainGrouped()
"""Both keep nothing of a pass."""
