"""Defines linear layers with weights sharded over the tensor-parallel group.

They combine the f and g functions of Megatron-LM (Shoeybi et al. 2019) and its sequence
parallelism (Korthikanti et al. 2022) in complete layers, because overlapping
communication with the weight gradient needs both in one backward. Activations are flat
tokens [T, width], so sequence parallelism splits dim 0 for any batch. Every layer is
constructed with the local shape of its weight, as in the parameter table. Must not
know: the model, data parallelism.

Shapes: T tokens (t of them on this rank under sequence parallelism), I inputs, O outputs.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ray.distributed import collectives
from megatron_ray.distributed.collectives import Group
from megatron_ray.ops.autograd import AutogradFunction
from megatron_ray.ops.dtypes import add_residual_
from megatron_ray.ops.grad_slots import (
    SlottedModule,
    deliver_bias_grad,
    deliver_weight_grad,
    needs_grad,
)
from megatron_ray.ops.matmul import forward_product, input_grad_product
from megatron_ray.ops.products import PLAIN, Multiplication, Products
from megatron_ray.tensor_parallel.group import TensorParallel

Shape = tuple[int, ...]


class ColumnParallelLinear(SlottedModule):
    """Y = X W^T + b with the rows of W sharded: [T or t, I] -> [T, O/tp]."""

    def __init__(
        self, weight_shape: Shape, *, bias: bool, tp: TensorParallel, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.tp = tp
        self.multiplication: Multiplication = PLAIN
        self.weight = nn.Parameter(torch.empty(weight_shape, dtype=dtype))
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(weight_shape[0], dtype=dtype))

    def forward(self, inputs_TI: Tensor) -> Tensor:
        """Returns this rank's outputs for all tokens."""
        return _Column.apply(inputs_TI, self.weight, self.bias, self)


class QKVParallelLinear(ColumnParallelLinear):
    """Queries, keys and values of this rank's heads, concatenated.

    With fewer key/value heads than ranks, several ranks have the same head.
    """

    def __init__(
        self,
        weight_shape: Shape,
        *,
        heads: int,
        groups: int,
        bias: bool,
        tp: TensorParallel,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(weight_shape, bias=bias, tp=tp, dtype=dtype)
        self.heads = heads
        """Query heads on this rank."""
        self.groups = groups
        """Key/value heads on this rank."""


class _Column(AutogradFunction[Tensor]):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        module: ColumnParallelLinear,
    ) -> Tensor:
        # Saves only this rank's tokens, not the gathered ones.
        ctx.save_for_backward(inputs, weight)
        ctx.module = module
        products = module.multiplication.begin_pass()
        ctx.products = products
        _, output = multiply_gathered(module.tp, products, inputs, weight)
        if bias is not None:
            output.add_(bias)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        module: ColumnParallelLinear = ctx.module
        products: Products = ctx.products
        grad = grad.contiguous()
        # Gathering the inputs overlaps with the input gradient's product, and reducing the
        # input gradient overlaps with the weight gradient's product.
        gathered, arriving = _start_gather_for_weight_grad(module, inputs)
        reduced, pending = _start_input_grad(module, products, grad, weight, arriving)
        grad_weight = None
        if module.is_deferred("weight"):
            _defer_weight_grad(module, inputs, grad, products)
        else:
            grad_weight = deliver_weight_grad(module, gathered, grad, products)
        grad_bias = deliver_bias_grad(module, grad)
        pending.wait()
        return reduced, grad_weight, grad_bias, None


def multiply_gathered(
    tp: TensorParallel, products: Products, inputs_tI: Tensor, weight_OI: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the inputs of all tokens [T, I], and inputs @ weight^T of them [T, O].

    What overlaps is never multiplied in FP8, see `validation.layout`.
    """
    if tp.overlap is not None:
        product = partial(forward_product, weight_OI=weight_OI)
        return tp.overlap.gather_and_multiply(product, inputs_tI, weight_OI.shape[0])
    gathered = collectives.all_gather_rows(inputs_tI, tp.sequence_group)
    return gathered, products.forward(gathered, weight_OI)


# Inputs are gathered again in the backward instead of saved. If the weight's product is
# deferred, they are gathered when it is computed, so that a zero-bubble schedule saves no
# more than others.


def _multiplies_weight_grad(module: ColumnParallelLinear) -> bool:
    """Returns whether the running backward pass computes the weight's gradient."""
    return needs_grad(module, "weight") and not module.is_deferred("weight")


def _start_gather_for_weight_grad(
    module: ColumnParallelLinear, inputs_tI: Tensor
) -> tuple[Tensor, collectives.Pending]:
    group = None
    if _multiplies_weight_grad(module):
        group = module.tp.sequence_group
    return collectives.start_all_gather_rows(inputs_tI, group)


def _start_input_grad(
    module: ColumnParallelLinear,
    products: Products,
    grad_TO: Tensor,
    weight_OI: Tensor,
    arriving: collectives.Pending,
) -> tuple[Tensor, collectives.Pending]:
    """Computes the input gradient and starts its sum over tp.

    The gather for the weight gradient has `arriving` then. Returns what
    `start_input_grad_reduction` returns.
    """
    overlap = module.tp.overlap
    if overlap is None or _multiplies_weight_grad(module):
        grad_TI = products.input_grad(grad_TO, weight_OI)
        arriving.wait()
        return start_input_grad_reduction(module.tp, grad_TI)
    # No other product overlaps with the sum.
    product = partial(input_grad_product, weight_OI=weight_OI)
    grad_tI = overlap.multiply_and_reduce_scatter(product, grad_TO, weight_OI.shape[1])
    return grad_tI, collectives.DONE


def _defer_weight_grad(
    module: ColumnParallelLinear, inputs_tI: Tensor, grad_TO: Tensor, products: Products
) -> None:
    slot = module.slots["weight"]
    group = module.tp.sequence_group
    slot.contribute(partial(_accumulate_gathered, inputs_tI, group, grad_TO, products))


def _accumulate_gathered(
    inputs_tI: Tensor,
    group: Group,
    grad_TO: Tensor,
    products: Products,
    main_OI: Tensor,
    *,
    fresh: bool,
) -> None:
    """Gathers the inputs and accumulates grad^T @ inputs."""
    inputs_TI = collectives.all_gather_rows(inputs_tI, group)
    products.accumulate_weight_grad(main_OI, grad_TO, inputs_TI, fresh=fresh)


def start_input_grad_reduction(
    tp: TensorParallel, grad_TI: Tensor
) -> tuple[Tensor, collectives.Pending]:
    """Starts the sum over tp of the input gradient of a column-parallel product.

    Returns the tensor that receives the sum (this rank's tokens under sequence
    parallelism) and the running collective.
    """
    if tp.sequence_group is not None:
        return collectives.start_reduce_scatter_rows(grad_TI, tp.sequence_group)
    return grad_TI, collectives.start_all_reduce(grad_TI, tp.group)


class RowParallelLinear(SlottedModule):
    """Y = residual (if given) + sum over ranks of X W^T, + b.

    Y has the type of the residual, which may be wider than that of X and W.
    The columns of W are sharded: [T, I/tp] -> [T or t, O]. The bias is replicated on
    every rank and is added after the sum.
    """

    def __init__(
        self, weight_shape: Shape, *, bias: bool, tp: TensorParallel, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.tp = tp
        self.multiplication: Multiplication = PLAIN
        self.weight = nn.Parameter(torch.empty(weight_shape, dtype=dtype))
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(weight_shape[0], dtype=dtype))

    def forward(
        self,
        inputs_TI: Tensor,
        residual_TO: Tensor | None,
        *,
        is_output_needed: bool = True,
    ) -> Tensor:
        """Returns the sum over all ranks, with the residual added.

        Without `is_output_needed` the output stays uninitialised, for the last layer of
        a recomputation: only the tensors saved for the backward are needed, so product
        and communication are skipped.
        """
        return _Row.apply(
            inputs_TI, residual_TO, self.weight, self.bias, self, is_output_needed
        )


class _Row(AutogradFunction[Tensor]):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        module: RowParallelLinear,
        is_output_needed: bool,
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.module = module
        products = module.multiplication.begin_pass()
        ctx.products = products
        ctx.has_residual = residual is not None
        tp = module.tp
        is_wide = residual is not None and residual.dtype != inputs.dtype
        if not is_output_needed:
            tokens = inputs.shape[0] // collectives.size(tp.sequence_group)
            like = residual if residual is not None else inputs
            return like.new_empty(tokens, weight.shape[0])
        # On one rank the product adds the residual, with one rounding. On several ranks it
        # is added once, after the sum.
        if tp.group is None and residual is not None and not is_wide:
            output = products.forward_plus(inputs, weight, residual)
        else:
            output = _sum_of_products(tp, products, inputs, weight)
            if residual is not None:
                output = add_residual_(output, residual)
        if bias is not None:
            output.add_(bias)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        module: RowParallelLinear = ctx.module
        products: Products = ctx.products
        # The forward scattered tokens, so the backward gathers them, also for the weight
        # gradient. A wide gradient is that of the residual; products take the short one.
        grad = grad.contiguous()
        short = grad.to(inputs.dtype)
        gathered, grad_inputs = _multiply_gathered_grad(module.tp, products, short, weight)
        grad_residual = None
        if ctx.has_residual:
            grad_residual = grad
        grad_weight = deliver_weight_grad(module, inputs, gathered, products)
        # Under sequence parallelism from this rank's tokens only; the parameter table then
        # marks the bias as summed over tp.
        grad_bias = deliver_bias_grad(module, grad)
        return grad_inputs, grad_residual, grad_weight, grad_bias, None, None


def _sum_of_products(
    tp: TensorParallel, products: Products, inputs_TI: Tensor, weight_OI: Tensor
) -> Tensor:
    """Returns the sum over ranks of inputs @ weight^T: [T or t, O]."""
    if tp.overlap is not None:
        product = partial(forward_product, weight_OI=weight_OI)
        width = weight_OI.shape[0]
        return tp.overlap.multiply_and_reduce_scatter(product, inputs_TI, width)
    output = products.forward(inputs_TI, weight_OI)
    if tp.sequence_group is not None:
        return collectives.reduce_scatter_rows(output, tp.sequence_group)
    return collectives.all_reduce(output, tp.group)


def _multiply_gathered_grad(
    tp: TensorParallel, products: Products, grad_tO: Tensor, weight_OI: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of all tokens [T, O], and grad @ weight of them [T, I]."""
    if tp.overlap is not None:
        product = partial(input_grad_product, weight_OI=weight_OI)
        return tp.overlap.gather_and_multiply(product, grad_tO, weight_OI.shape[1])
    gathered = collectives.all_gather_rows(grad_tO, tp.sequence_group)
    return gathered, products.input_grad(gathered, weight_OI)


class ReplicatedLinear(SlottedModule):
    """Y = X W^T + b with W replicated: [T or t, I] -> [T or t, O], no communication.

    Under sequence parallelism each rank processes its own tokens only, and the
    parameter table marks the gradients as summed over tp.
    """

    def __init__(self, weight_shape: Shape, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.multiplication: Multiplication = PLAIN
        self.weight = nn.Parameter(torch.empty(weight_shape, dtype=dtype))
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(weight_shape[0], dtype=dtype))

    def forward(self, inputs_TI: Tensor) -> Tensor:
        """Returns the outputs of this rank's tokens."""
        return _Replicated.apply(inputs_TI, self.weight, self.bias, self)


class _Replicated(AutogradFunction[Tensor]):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        module: ReplicatedLinear,
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.module = module
        products = module.multiplication.begin_pass()
        ctx.products = products
        output = products.forward(inputs, weight)
        if bias is not None:
            output.add_(bias)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        module: ReplicatedLinear = ctx.module
        products: Products = ctx.products
        grad = grad.contiguous()
        grad_weight = deliver_weight_grad(module, inputs, grad, products)
        grad_bias = deliver_bias_grad(module, grad)
        return products.input_grad(grad, weight), grad_weight, grad_bias, None


class GatherFromSequenceParallel(nn.Module):
    """Gathers the input of all ranks' heads: [T or t, width] -> [T, width].

    Its backward sums: each rank's heads contribute a part of the gradient.
    """

    def __init__(self, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp

    def forward(self, x_TW: Tensor) -> Tensor:
        """Returns the rows of all tokens."""
        return _GatherFromSequenceParallel.apply(x_TW, self.tp)


class _GatherFromSequenceParallel(AutogradFunction[Tensor]):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return collectives.all_gather_rows(x.contiguous(), tp.sequence_group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        reduced, pending = start_input_grad_reduction(ctx.tp, grad.contiguous())
        pending.wait()
        return reduced, None
