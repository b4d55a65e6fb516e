"""Computes the products of a linear layer in FP8, by a recipe.

Operands are quantized right before each product, and a layer keeps them in their own
type, so that nothing else of it depends on the recipe. A weight that ZeRO-3 has gathered
in FP8 is one already (`Fp8Weight`). Must not know: layers, the number of layers, when
scales change.

A tensor of which each rank of a group has a part has one scale: its largest value is
reduced over the group. Blocks need no reduction, because parts begin at blocks
(`validation.fp8`).

Shapes: T tokens, I inputs, O outputs, E experts, R rows sorted by expert.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_ray.distributed import collectives
from megatron_ray.distributed.collectives import Group
from megatron_ray.ops.fp8.delayed import LayerScales
from megatron_ray.ops.fp8.kernels import multiply
from megatron_ray.ops.fp8.quantize import (
    Quantized,
    amax_of,
    quantize_blocks,
    quantize_tensor,
    scale_for,
)
from megatron_ray.ops.fp8.recipe import Recipe, Role
from megatron_ray.ops.fp8.weights import Fp8Weight
from megatron_ray.ops.matmul import Counts, concatenate, split_by_expert

Scale = tuple[Tensor, Tensor]
"""What a tensor is multiplied by, and what its values are multiplied by: fp32 scalars."""


@dataclass(frozen=True)
class Fp8Multiplication:
    """How a layer multiplies in FP8."""

    recipe: Recipe
    group: Group = None
    """Ranks that have a part each of the operands in `split`."""
    split: tuple[Role, ...] = ()
    scales: LayerScales | None = None
    """The layer's scales with recipe=delayed."""

    def begin_pass(self) -> "Fp8Products":
        """Returns the products of a new forward pass and of its backward pass."""
        return Fp8Products(self)


@dataclass(frozen=True)
class Fp8GroupedMultiplication:
    """How the experts of a layer multiply in FP8.

    Each expert's tensors have scales of their own; with recipe=delayed those of all of a
    layer's experts share them.
    """

    of_expert: Fp8Multiplication

    def begin_pass(self) -> "Fp8GroupedProducts":
        """Returns the products of a new forward pass and of its backward pass."""
        return Fp8GroupedProducts(self.of_expert)


@dataclass
class Fp8Products:
    """The products of one pass through a layer; implements `ops.products.Products`.

    The scale of a tensor is computed at its first use, and used again in the backward
    pass.
    """

    multiplication: Fp8Multiplication
    _scales: dict[Role, Scale] = field(default_factory=dict)

    def forward(self, inputs_TI: Tensor, weight_OI: Tensor) -> Tensor:
        """Returns inputs @ weight^T: [T, O]."""
        self._prepare({"inputs": inputs_TI, "weight": weight_OI})
        return self._multiply(
            self._quantize("inputs", inputs_TI),
            self._quantize("weight", weight_OI),
            inputs_TI.dtype,
        )

    def forward_plus(
        self, inputs_TI: Tensor, weight_OI: Tensor, addend_TO: Tensor
    ) -> Tensor:
        """Returns addend + inputs @ weight^T, rounded twice: [T, O]."""
        return self.forward(inputs_TI, weight_OI).add_(addend_TO)

    def input_grad(self, grad_TO: Tensor, weight_OI: Tensor) -> Tensor:
        """Returns grad @ weight: [T, I]."""
        self._prepare({"grad": grad_TO, "weight": weight_OI})
        return self._multiply(
            self._quantize("grad", grad_TO),
            self._quantize("weight", weight_OI, transposed=True),
            grad_TO.dtype,
        )

    def weight_grad(self, grad_TO: Tensor, inputs_TI: Tensor) -> Tensor:
        """Returns grad^T @ inputs: [O, I]."""
        return self._weight_grad(grad_TO, inputs_TI, grad_TO.dtype)

    def accumulate_weight_grad(
        self, main_OI: Tensor, grad_TO: Tensor, inputs_TI: Tensor, *, fresh: bool
    ) -> None:
        """Adds grad^T @ inputs to main, or overwrites it if `fresh`."""
        product = self._weight_grad(grad_TO, inputs_TI, main_OI.dtype)
        if fresh:
            main_OI.copy_(product)
        else:
            main_OI.add_(product)

    def _weight_grad(
        self, grad_TO: Tensor, inputs_TI: Tensor, dtype: torch.dtype
    ) -> Tensor:
        self._prepare({"grad": grad_TO, "inputs": inputs_TI})
        return self._multiply(
            self._quantize("grad", grad_TO, transposed=True),
            self._quantize("inputs", inputs_TI, transposed=True),
            dtype,
        )

    def _multiply(self, a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
        return multiply(a, b, dtype, self.multiplication.recipe.kernel)

    def _quantize(
        self, role: Role, tensor: Tensor, *, transposed: bool = False
    ) -> Quantized:
        if isinstance(tensor, Fp8Weight):
            return tensor.quantized(transposed=transposed)
        recipe = self.multiplication.recipe
        matrix = tensor.t() if transposed else tensor
        dtype = recipe.dtype_of(role)
        block = recipe.block_of(role)
        if block is not None:
            return quantize_blocks(matrix, dtype, block)
        return quantize_tensor(matrix, dtype, *self._scales[role])

    def _prepare(self, operands: dict[Role, Tensor]) -> None:
        """Computes the scales of whole tensors that are used for the first time."""
        recipe = self.multiplication.recipe
        amaxes: dict[Role, Tensor] = {}
        for role, tensor in operands.items():
            if role in self._scales or isinstance(tensor, Fp8Weight):
                continue
            if recipe.block_of(role) is None:
                amaxes[role] = amax_of(tensor)
        scales = self.multiplication.scales
        if scales is None:
            self._reduce(amaxes)
        for role, amax in amaxes.items():
            if scales is None:
                scale = scale_for(amax, recipe.dtype_of(role))
                inverse = scale.reciprocal()
            else:
                scales.record(role, amax)
                scale = scales.scale(role)
                # An infinity, which is clamped like all large values, must not get lost.
                inverse = torch.where(amax.isfinite(), scale.reciprocal(), torch.nan)
            self._scales[role] = (scale, inverse)

    def _reduce(self, amaxes: dict[Role, Tensor]) -> None:
        """Takes the maximum over ranks of tensors that are split."""
        split = [role for role in amaxes if role in self.multiplication.split]
        if self.multiplication.group is None or not split:
            return
        # One collective for both operands of a product.
        reduced = torch.stack([amaxes[role] for role in split])
        collectives.all_reduce(
            reduced, self.multiplication.group, torch.distributed.ReduceOp.MAX
        )
        amaxes.update(zip(split, reduced.unbind(), strict=True))


class Fp8GroupedProducts:
    """The products of one pass through experts, one after another.

    Implements `ops.products.GroupedProducts`. Reads the counts on the host.
    """

    def __init__(self, of_expert: Fp8Multiplication) -> None:
        self._of_expert = of_expert
        self._experts: dict[int, Fp8Products] = {}

    def forward(self, inputs_RI: Tensor, weight_EOI: Tensor, counts: Counts) -> Tensor:
        """Returns each expert's inputs @ its weight^T: [R, O]."""
        return self._for_each(
            inputs_RI,
            counts,
            weight_EOI.shape[1],
            lambda expert, rows: self._of(expert).forward(rows, weight_EOI[expert]),
        )

    def input_grad(self, grad_RO: Tensor, weight_EOI: Tensor, counts: Counts) -> Tensor:
        """Returns each expert's grad @ its weight: [R, I]."""
        return self._for_each(
            grad_RO,
            counts,
            weight_EOI.shape[2],
            lambda expert, rows: self._of(expert).input_grad(rows, weight_EOI[expert]),
        )

    def weight_grad(
        self, grad_RO: Tensor, inputs_RI: Tensor, counts: Counts, num_experts: int
    ) -> Tensor:
        """Returns each expert's grad^T @ inputs: [E, O, I]; zero for one without rows."""
        product = grad_RO.new_zeros(num_experts, grad_RO.shape[1], inputs_RI.shape[1])
        self.accumulate_weight_grad(product, grad_RO, inputs_RI, counts, fresh=True)
        return product

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
        grads = split_by_expert(grad_RO, counts)
        inputs = split_by_expert(inputs_RI, counts)
        for expert, (grad, rows) in enumerate(zip(grads, inputs, strict=True)):
            main = main_EOI[expert]
            if len(rows):
                self._of(expert).accumulate_weight_grad(main, grad, rows, fresh=fresh)
            elif fresh:
                main.zero_()

    def _for_each(
        self,
        rows_R: Tensor,
        counts: Counts,
        width: int,
        product: Callable[[int, Tensor], Tensor],
    ) -> Tensor:
        products = []
        for expert, rows in enumerate(split_by_expert(rows_R, counts)):
            if len(rows):
                products.append(product(expert, rows))
        return concatenate(products, rows_R, width)

    def _of(self, expert: int) -> Fp8Products:
        if expert not in self._experts:
            self._experts[expert] = self._of_expert.begin_pass()
        return self._experts[expert]
