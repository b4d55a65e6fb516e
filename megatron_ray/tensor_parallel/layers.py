"""Column- and row-parallel linear layers, vocabulary-parallel embedding, norms.

Owns: the tensor-parallel forward and backward.

The f and g pairs of Megatron-LM (Shoeybi et al. 2019) and its sequence parallelism
(Korthikanti et al. 2022), in the form of whole layers because the overlap of
communication with the weight gradient needs both in one backward. Activations are flat
tokens [T, width], so the sequence-parallel cut is along dim 0 whatever the batch. Every
layer takes its group as an argument. Must not know: the model, data parallelism.

Shapes: T tokens (t of them on this rank under sequence parallelism), I inputs, O
outputs, H hidden, V vocabulary rows.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ray.distributed import collectives
from megatron_ray.distributed.collectives import Group
from megatron_ray.ops.grad_slots import (
    SlottedModule,
    deliver_bias,
    deliver_linear,
    deliver_rows,
    needs_grad,
)
from megatron_ray.ops.matmul import (
    forward_product,
    forward_product_plus,
    input_grad_product,
)


class ColumnParallelLinear(SlottedModule):
    """Y = X W^T + b with the rows of W cut over the group: [T or t, I] -> [T, O/tp]."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: bool,
        group: Group,
        sequence_parallel: bool,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(group, sequence_parallel)
        local = outputs // collectives.size(group)
        self.weight = nn.Parameter(torch.empty(local, inputs, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(local, dtype=dtype)) if bias else None

    def forward(self, inputs_TI: Tensor) -> Tensor:
        return _Column.apply(inputs_TI, self.weight, self.bias, self)  # type: ignore[no-any-return, no-untyped-call]


class QKVParallelLinear(ColumnParallelLinear):
    """Queries, keys and values of the heads of this rank, one after another.

    Where there are fewer key/value heads than ranks, several ranks hold the same one.
    """

    def __init__(
        self,
        inputs: int,
        heads: int,
        groups: int,
        head_width: int,
        *,
        bias: bool,
        group: Group,
        sequence_parallel: bool,
        dtype: torch.dtype,
    ) -> None:
        tp = collectives.size(group)
        held = max(groups, tp)
        super().__init__(
            inputs,
            (heads + 2 * held) * head_width,
            bias=bias,
            group=group,
            sequence_parallel=sequence_parallel,
            dtype=dtype,
        )
        self.heads = heads // tp
        self.groups = held // tp


class RowParallelLinear(SlottedModule):
    """Y = residual (if given) + sum over ranks of X W^T, + b, with the columns of W cut
    over the group: [T, I/tp] -> [T or t, O].
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: bool,
        group: Group,
        sequence_parallel: bool,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(group, sequence_parallel)
        self.weight = nn.Parameter(
            torch.empty(outputs, inputs // collectives.size(group), dtype=dtype)
        )
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype)) if bias else None

    def forward(
        self,
        inputs_TI: Tensor,
        residual_TO: Tensor | None,
        *,
        is_output_needed: bool = True,
    ) -> Tensor:
        """Returns Y; when `is_output_needed` is False its values are left undefined and
        only what the backward pass needs is kept, as in a recomputation.
        """
        return _Row.apply(  # type: ignore[no-any-return, no-untyped-call]
            inputs_TI, residual_TO, self.weight, self.bias, self, is_output_needed
        )


class ReplicatedLinear(SlottedModule):
    """Y = X W^T with W whole on every rank: [T or t, I] -> [T or t, O], nothing sent.

    Under sequence parallelism each rank sees its own tokens only, and the parameter
    table says that the gradients are then summed over tp.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        group: Group,
        sequence_parallel: bool,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(group, sequence_parallel)
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype))

    def forward(self, inputs_TI: Tensor) -> Tensor:
        return _Replicated.apply(inputs_TI, self.weight, self)  # type: ignore[no-any-return, no-untyped-call]


class GatherFromSequenceParallel(SlottedModule):
    """What the heads of all ranks read: [T or t, width] -> [T, width].

    Each rank's heads give a part of its gradient.
    """

    def forward(self, x_TW: Tensor) -> Tensor:
        return _SharedByHeads.apply(x_TW, self)  # type: ignore[no-any-return, no-untyped-call]


class VocabParallelEmbedding(SlottedModule):
    """Rows of the table cut over the group: ids [T] -> [T or t, H]."""

    def __init__(
        self,
        rows: int,
        width: int,
        *,
        group: Group,
        sequence_parallel: bool,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(group, sequence_parallel)
        self.weight = nn.Parameter(
            torch.empty(rows // collectives.size(group), width, dtype=dtype)
        )

    def forward(self, ids_T: Tensor) -> Tensor:
        return _VocabEmbedding.apply(ids_T, self.weight, self)  # type: ignore[no-any-return, no-untyped-call]


class PositionEmbedding(SlottedModule):
    """A table that every rank holds whole: position ids [T] -> [T or t, H]."""

    def __init__(
        self,
        rows: int,
        width: int,
        *,
        group: Group,
        sequence_parallel: bool,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(group, sequence_parallel)
        self.weight = nn.Parameter(torch.empty(rows, width, dtype=dtype))

    def forward(self, ids_T: Tensor) -> Tensor:
        ids = collectives.local_rows(ids_T, self.sequence_group)
        return _Lookup.apply(ids, self.weight, self)  # type: ignore[no-any-return, no-untyped-call]


def start_input_grad_reduction(
    module: SlottedModule, grad_TI: Tensor
) -> tuple[Tensor, collectives.Pending]:
    """Starts the sum of a column-cut product's input gradient over tp; each rank keeps
    its tokens under sequence parallelism.
    """
    if module.sequence_group is not None:
        return collectives.start_reduce_scatter_rows(grad_TI, module.sequence_group)
    return grad_TI, collectives.start_all_reduce(grad_TI, module.group)


class _Column(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        module: ColumnParallelLinear,
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.module = module
        gathered = collectives.all_gather_rows(inputs, module.sequence_group)
        output = forward_product(gathered, weight)
        return output.add_(bias) if bias is not None else output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        module: ColumnParallelLinear = ctx.module
        grad = grad.contiguous()
        # Inputs are gathered again instead of kept: behind the input gradient's
        # product, or when the weight's product is computed if that is later, so that a
        # schedule which puts it off holds no more than others.
        slot = module.slot("weight")
        later = slot is not None and slot.puts_off
        gathers = needs_grad(module, "weight") and not later
        gathered, arriving = collectives.start_all_gather_rows(
            inputs, module.sequence_group if gathers else None
        )
        grad_inputs = input_grad_product(grad, weight)
        arriving.wait()
        reduced, pending = start_input_grad_reduction(module, grad_inputs)
        grad_weight = None
        if slot is not None and later:
            slot.linear(
                partial(collectives.all_gather_rows, inputs, module.sequence_group), grad
            )
        else:
            grad_weight = deliver_linear(
                module, gathered, grad
            )  # overlaps with the reduction
        grad_bias = deliver_bias(module, grad)
        pending.wait()
        return reduced, grad_weight, grad_bias, None


class _Row(torch.autograd.Function):
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
        ctx.adds = residual is not None
        if not is_output_needed:
            return inputs.new_empty(
                inputs.shape[0] // collectives.size(module.sequence_group), weight.shape[0]
            )
        if module.group is None:
            output = (
                forward_product(inputs, weight)
                if residual is None
                else forward_product_plus(inputs, weight, residual)
            )
        else:
            partial = forward_product(inputs, weight)
            if module.sequence_group is not None:
                output = collectives.reduce_scatter_rows(partial, module.sequence_group)
            else:
                output = collectives.all_reduce(partial, module.group)
            if residual is not None:
                output.add_(residual)
        return output.add_(bias) if bias is not None else output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        module: RowParallelLinear = ctx.module
        grad = grad.contiguous()
        gathered = collectives.all_gather_rows(grad, module.sequence_group)
        grad_inputs = input_grad_product(gathered, weight)
        grad_weight = deliver_linear(module, inputs, gathered)
        return (
            grad_inputs,
            grad if ctx.adds else None,
            grad_weight,
            deliver_bias(module, grad),
            None,
            None,
        )


class _Replicated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, module: ReplicatedLinear
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.module = module
        return forward_product(inputs, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        grad = grad.contiguous()
        return (
            input_grad_product(grad, weight),
            deliver_linear(ctx.module, inputs, grad),
            None,
        )


class _SharedByHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: GatherFromSequenceParallel) -> Tensor:
        ctx.module = module
        return collectives.all_gather_rows(x.contiguous(), module.sequence_group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        reduced, pending = start_input_grad_reduction(ctx.module, grad.contiguous())
        pending.wait()
        return reduced, None


class _VocabEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight: Tensor, module: VocabParallelEmbedding
    ) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(ids, weight)
        rows, outside = local_ids(ids, weight.shape[0], module.group)
        found = torch.nn.functional.embedding(rows, weight)
        if outside is None:
            return found
        found.masked_fill_(outside[:, None], 0)
        if module.sequence_group is not None:
            return collectives.reduce_scatter_rows(found, module.sequence_group)
        return collectives.all_reduce(found, module.group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        module: VocabParallelEmbedding = ctx.module
        ids, weight = ctx.saved_tensors
        if not needs_grad(module, "weight"):
            return None, None, None
        grad = collectives.all_gather_rows(grad.contiguous(), module.sequence_group)
        rows, outside = local_ids(ids, weight.shape[0], module.group)
        if outside is not None:
            grad = grad.masked_fill(outside[:, None], 0)
        return None, deliver_rows(module, weight, rows, grad), None


def local_ids(ids: Tensor, rows: int, group: Group) -> tuple[Tensor, Tensor | None]:
    """Ids as rows of this rank, which has `rows` of the vocabulary; those of other
    ranks point at row 0 and are marked in the mask; None where there are none.
    """
    if group is None:
        return ids, None
    local = ids - group.rank() * rows
    outside = (local < 0) | (local >= rows)
    return local.masked_fill(outside, 0), outside


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, module: PositionEmbedding) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(ids, weight)
        return torch.nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ids, weight = ctx.saved_tensors
        if not needs_grad(ctx.module, "weight"):
            return None, None, None
        return None, deliver_rows(ctx.module, weight, ids, grad), None
