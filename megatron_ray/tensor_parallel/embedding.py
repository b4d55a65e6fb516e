"""Looks up embeddings of tokens, sharded over the vocabulary, and of positions.

Must not know: the model, data parallelism.

Shapes: T tokens (t of them on this rank under sequence parallelism), H hidden.
"""

from typing import Any

import torch
from torch import Tensor, nn

from megatron_ray.distributed import collectives
from megatron_ray.ops.autograd import AutogradFunction
from megatron_ray.ops.grad_slots import SlottedModule, deliver_embedding_grad, needs_grad
from megatron_ray.tensor_parallel.group import TensorParallel
from megatron_ray.tensor_parallel.layers import Shape


class VocabParallelEmbedding(SlottedModule):
    """An embedding with rows sharded over the group: ids [T] -> [T or t, H]."""

    def __init__(
        self, weight_shape: Shape, *, tp: TensorParallel, dtype: torch.dtype, uses: int = 1
    ) -> None:
        super().__init__(uses)
        self.tp = tp
        self.weight = nn.Parameter(torch.empty(weight_shape, dtype=dtype))

    def forward(self, ids_T: Tensor) -> Tensor:
        """Returns the embeddings of this rank's tokens."""
        return _VocabEmbedding.apply(ids_T, self.weight, self)


class _VocabEmbedding(AutogradFunction[Tensor]):
    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight: Tensor, module: VocabParallelEmbedding
    ) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(ids, weight)
        tp = module.tp
        rows, is_elsewhere = local_ids(ids, weight.shape[0], tp)
        embedded = torch.nn.functional.embedding(rows, weight)
        if is_elsewhere is None:
            return embedded
        # Each token's row is nonzero on one rank only, so the sum is that row.
        embedded.masked_fill_(is_elsewhere[:, None], 0)
        if tp.sequence_group is not None:
            return collectives.reduce_scatter_rows(embedded, tp.sequence_group)
        return collectives.all_reduce(embedded, tp.group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        module: VocabParallelEmbedding = ctx.module
        ids, weight = ctx.saved_tensors
        if not needs_grad(module, "weight"):
            return None, None, None
        # Every rank needs the gradients of all tokens, because any token may be in its
        # rows.
        grad = collectives.all_gather_rows(grad.contiguous(), module.tp.sequence_group)
        rows, is_elsewhere = local_ids(ids, weight.shape[0], module.tp)
        if is_elsewhere is not None:
            grad = grad.masked_fill(is_elsewhere[:, None], 0)
        return None, deliver_embedding_grad(module, weight, rows, grad), None


def local_ids(
    ids: Tensor, local_rows: int, tp: TensorParallel
) -> tuple[Tensor, Tensor | None]:
    """Returns ids as local rows of this rank, which has `local_rows` of the vocabulary.

    Ids of other ranks become row 0 and are marked in the mask (second value), which is
    None without sharding.
    """
    if tp.group is None:
        return ids, None
    # The lookup of row 0 is masked later.
    local = ids - tp.rank * local_rows
    is_elsewhere = (local < 0) | (local >= local_rows)
    return local.masked_fill(is_elsewhere, 0), is_elsewhere


class PositionEmbedding(SlottedModule):
    """Learned positions, replicated on every rank: position ids [T] -> [T or t, H]."""

    def __init__(
        self, weight_shape: Shape, *, tp: TensorParallel, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.tp = tp
        self.weight = nn.Parameter(torch.empty(weight_shape, dtype=dtype))

    def forward(self, ids_T: Tensor) -> Tensor:
        """Returns the embeddings of this rank's tokens."""
        # The table is replicated, so only this rank's tokens are looked up.
        ids = collectives.local_rows(ids_T, self.tp.sequence_group)
        return _Lookup.apply(ids, self.weight, self)


class _Lookup(AutogradFunction[Tensor]):
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
        return None, deliver_embedding_grad(ctx.module, weight, ids, grad), None
