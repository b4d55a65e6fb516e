"""Output head and cross entropy in one step, over a vocabulary cut across the tensor-parallel group.

Owns: the sum of -log p(label) over tokens, and its gradient, which is written over the logits while they are in cache: no second
exponential, no fp32 copy of all logits in bf16, no full-vocabulary softmax kept. The weight gradient is one product, handed to the
slot, so a schedule can defer it. Two collectives of T numbers per call. Must not know: microbatches, loss scaling.

Shapes: T tokens (t of them on this rank under sequence parallelism), H hidden, V this rank's vocabulary rows.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from megatron_ray import collectives
from megatron_ray.collectives import Group
from megatron_ray.matmul import forward_product, input_grad_product
from megatron_ray.tensor_parallel.layers import SlottedModule, deliver_linear
from megatron_ray.tensor_parallel.norm import widened

# fp32 logits worked on at a time: about one core's second-level cache on CPU; enough to fill the machine on CUDA.
_CHUNK_ELEMENTS = {"cpu": 512 * 1024, "cuda": 64 * 1024 * 1024}


class VocabParallelHead(SlottedModule):
    """Logits and loss. `weight` may be the word embedding's (tied)."""

    def __init__(
        self,
        rows: int,
        width: int,
        vocabulary: int,
        *,
        group: Group,
        sequence_parallel: bool,
        dtype: torch.dtype,
        tied: nn.Parameter | None,
    ) -> None:
        super().__init__(group, sequence_parallel)
        local = rows // collectives.size(group)
        self.weight = nn.Parameter(torch.empty(local, width, dtype=dtype)) if tied is None else tied
        first = local * collectives.rank(group)
        self.first_row = first
        self.valid_rows = max(0, min(vocabulary - first, local))
        """Rows that are no padding."""
        self.vocabulary = vocabulary

    def forward(self, hidden_TH: Tensor, labels_T: Tensor, mask_T: Tensor) -> Tensor:
        """Sum over this data-parallel rank's tokens of mask x -log p(label), fp32, the same on every tp rank.

        Its backward takes the incoming gradient to be one: scaling by tokens happens once, in finalize_grads.
        """
        loss: Tensor = _HeadLoss.apply(hidden_TH, self.weight, labels_T, mask_T, self)  # type: ignore[no-untyped-call]
        return loss

    def logits(self, hidden_TH: Tensor) -> Tensor:
        """Logits [T, vocabulary] on every rank, padding cut off; for inference, no gradient to slots."""
        gathered = collectives.all_gather_rows(hidden_TH, self.sequence_group)
        local = forward_product(gathered, self.weight)
        if self.group is not None:
            local = collectives.all_gather_rows(local.t().contiguous(), self.group).t()
        return local[:, : self.vocabulary]


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, module: VocabParallelHead) -> Tensor:
        gathered = collectives.all_gather_rows(hidden, module.sequence_group)
        logits = forward_product(gathered, weight)
        if module.valid_rows < logits.shape[1]:
            logits[:, module.valid_rows :] = -torch.inf
        # Under tensor parallelism one chunk: two collectives in all, not two per chunk.
        rows = max(1, _CHUNK_ELEMENTS[logits.device.type] // logits.shape[1]) if module.group is None else logits.shape[0]
        want_grad = any(ctx.needs_input_grad[:2])  # type: ignore[attr-defined]
        losses = [
            _softmax_loss_(chunk, chunk_labels, chunk_mask, module, want_grad)
            for chunk, chunk_labels, chunk_mask in zip(
                torch.split(logits, rows), torch.split(labels, rows), torch.split(mask, rows), strict=True
            )
        ]
        if want_grad:
            ctx.save_for_backward(gathered, weight, logits)
            ctx.module = module  # type: ignore[attr-defined]
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        gathered, weight, grad_logits = ctx.saved_tensors
        module: VocabParallelHead = ctx.module
        grad_hidden = input_grad_product(grad_logits, weight)
        if module.sequence_group is not None:
            reduced, pending = collectives.start_reduce_scatter_rows(grad_hidden, module.sequence_group)
        else:
            reduced, pending = grad_hidden, collectives.start_all_reduce(grad_hidden, module.group)
        grad_weight = deliver_linear(module, gathered, grad_logits)
        pending.wait()
        return reduced, grad_weight, None, None, None


def _softmax_loss_(logits: Tensor, labels: Tensor, mask: Tensor, module: VocabParallelHead, want_grad: bool) -> Tensor:
    """Loss of one chunk of tokens; overwrites `logits` [rows, V] with their gradient when it is wanted."""
    wide = widened(logits)  # the same memory when the logits are fp32 already
    largest = collectives.all_reduce(wide.amax(1), module.group, dist.ReduceOp.MAX)
    wide.sub_(largest[:, None])
    local = labels - module.first_row
    owned = None
    if module.group is not None:
        owned = (local >= 0) & (local < wide.shape[1])
        local = local.masked_fill(~owned, 0)
    predicted = wide.gather(1, local[:, None]).squeeze(1)
    if owned is not None:
        predicted.masked_fill_(~owned, 0)
    wide.exp_()
    sums = torch.stack([wide.sum(1), predicted])
    total, predicted = collectives.all_reduce(sums, module.group)
    loss: Tensor = total.log().sub_(predicted).mul_(mask).sum()
    if want_grad:
        wide.mul_((mask / total)[:, None])
        hit = mask if owned is None else mask * owned
        wide.scatter_add_(1, local[:, None], -hit[:, None])
        if wide is not logits:
            logits.copy_(wide)
    return loss
