"""Output head and cross entropy in one step, over a vocabulary cut across the
tensor-parallel group.

Owns: the sum of -log p(label) over tokens, and its gradient. A token's probabilities
are its exponentials times one number, so the exponentials are written over the logits
while these are in cache, and the numbers, which tensor-parallel ranks have to agree on,
go into the narrow side of both products of the backward: no second exponential, no fp32
copy of all logits in bf16, no pass over the vocabulary once the sums are known. The
weight gradient is one product, handed to the slot, so a schedule can defer it. Two
collectives of T numbers per call. Must not know: microbatches, loss scaling.

Shapes: T tokens (t of them on this rank under sequence parallelism), H hidden, V this
rank's vocabulary rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_ray.distributed import collectives
from megatron_ray.distributed.collectives import Group
from megatron_ray.ops.dtypes import to_fp32
from megatron_ray.ops.grad_slots import SlottedModule, deliver_linear
from megatron_ray.ops.matmul import forward_product, input_grad_product
from megatron_ray.sharding.loss_chunks import rows_at_once
from megatron_ray.tensor_parallel.layers import local_ids, start_input_grad_reduction

# A rank whose largest logit is further below the largest of all has probabilities under
# 1e-26; they count as that instead of nothing, so that no quotient overflows.
_FARTHEST = -60.0


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
        self.weight = (
            nn.Parameter(torch.empty(local, width, dtype=dtype)) if tied is None else tied
        )
        first = local * collectives.rank(group)
        self.valid_rows = max(0, min(vocabulary - first, local))
        """Rows that are no padding."""
        self.vocabulary = vocabulary
        self.softmax_shares_: Callable[[Tensor, Tensor], SoftmaxStats] = softmax_shares_

    def forward(self, hidden_TH: Tensor, labels_T: Tensor, mask_T: Tensor) -> Tensor:
        """Sum over this data-parallel rank's tokens of mask x -log p(label), fp32, the
        same on every tp rank.

        Its backward takes the incoming gradient to be one: scaling by tokens happens
        once, in finalize_grads.
        """
        loss: Tensor = _HeadLoss.apply(hidden_TH, self.weight, labels_T, mask_T, self)  # type: ignore[no-untyped-call]
        return loss

    def logits(self, hidden_TH: Tensor) -> Tensor:
        """Logits [T, vocabulary] on every rank, padding cut off; for inference, no
        gradient to slots.
        """
        gathered = collectives.all_gather_rows(hidden_TH, self.sequence_group)
        local = forward_product(gathered, self.weight)
        if self.group is not None:
            local = collectives.all_gather_rows(local.t().contiguous(), self.group).t()
        return local[:, : self.vocabulary]


class SoftmaxStats(NamedTuple):
    """What is known of rows of logits that shares have overwritten: exp(logits -
    largest) = shares x unit. All [T], fp32 or wider.
    """

    largest: Tensor
    total: Tensor
    """Sum of exp(logits - largest)."""
    chosen: Tensor
    """The logit of the label."""
    unit: Tensor


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        mask: Tensor,
        module: VocabParallelHead,
    ) -> Tensor:
        gathered = collectives.all_gather_rows(hidden, module.sequence_group)
        logits = forward_product(gathered, weight)
        if module.valid_rows < logits.shape[1]:
            logits[:, module.valid_rows :] = -torch.inf
        local, outside = local_ids(labels, logits.shape[1], module.group)
        own = _overwritten(logits, local, module)
        largest = collectives.all_reduce(
            own.largest.clone(), module.group, dist.ReduceOp.MAX
        )
        rescale = (own.largest - largest).clamp_(min=_FARTHEST).exp_()
        predicted = own.chosen - largest
        if outside is not None:
            predicted.masked_fill_(outside, 0)
        total, predicted = collectives.all_reduce(
            torch.stack([own.total * rescale, predicted]), module.group
        )
        if any(ctx.needs_input_grad[:2]):
            _subtract_one_hot_(logits, local, outside, own, total / rescale)
            ctx.save_for_backward(
                gathered, weight, logits, own.unit * rescale / total * mask
            )
            ctx.module = module
        loss: Tensor = total.log().sub_(predicted).mul_(mask).sum()
        return loss

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the logits is shares x factor, row by row."""
        gathered, weight, shares, factor = ctx.saved_tensors
        module: VocabParallelHead = ctx.module
        grad_hidden = input_grad_product(shares, weight)
        grad_hidden.mul_(factor[:, None])
        reduced, pending = start_input_grad_reduction(module, grad_hidden)
        grad_weight = deliver_linear(
            module,
            torch.mul(gathered, factor[:, None], out=torch.empty_like(gathered)),
            shares,
        )
        pending.wait()
        return reduced, grad_weight, None, None, None


def _overwritten(logits: Tensor, local: Tensor, module: VocabParallelHead) -> SoftmaxStats:
    """Writes shares over the logits [T, V], as many rows at a time as stay in cache."""
    rows = rows_at_once(logits.device.type, logits.shape[1])
    parts = [
        module.softmax_shares_(*chunk)
        for chunk in zip(torch.split(logits, rows), torch.split(local, rows), strict=True)
    ]
    found = SoftmaxStats(*(torch.cat(column) for column in zip(*parts, strict=True)))
    if module.valid_rows > 0:
        return found
    # A rank with nothing but padding, whose largest logit is minus infinity.
    logits.zero_()
    return found._replace(
        total=torch.zeros_like(found.total), unit=torch.ones_like(found.unit)
    )


def _subtract_one_hot_(
    shares: Tensor, local: Tensor, outside: Tensor | None, own: SoftmaxStats, one: Tensor
) -> None:
    """Subtracts one from the label's probability, before it is rounded; `one` is what
    that is in exponentials of this rank.
    """
    label = ((own.chosen - own.largest).exp_() - one) / own.unit
    if outside is not None:
        label = torch.where(outside, shares.gather(1, local[:, None]).squeeze(1), label)
    shares.scatter_(1, local[:, None], label.to(shares.dtype)[:, None])


def softmax_shares_(logits: Tensor, local: Tensor) -> SoftmaxStats:
    """Overwrites logits [rows, V] with shares; `local` [rows] are the labels' columns.

    A softmax takes one pass for difference, exponential, sum and quotient, and the
    largest logit's exponential is one, so its share tells the sum. But its exponential
    on CPU is off by up to 20 units in the last place: good for what is rounded to bf16,
    not for fp32.
    """
    # CPUs reduce bf16 slowly and widen anyway for the softmax; CUDA widens as it reads.
    on_cpu = logits.device.type == "cpu"
    rounded = logits.dtype.itemsize < 4
    source = to_fp32(logits) if on_cpu else logits
    largest = to_fp32(source.amax(1))
    chosen = to_fp32(source.gather(1, local[:, None]).squeeze(1))
    if on_cpu and not rounded:
        logits.sub_(largest[:, None]).exp_()
        return SoftmaxStats(largest, logits.sum(1), chosen, torch.ones_like(largest))
    shares = (
        torch.softmax(source, 1, out=source)
        if on_cpu
        else torch.softmax(source, 1, dtype=largest.dtype)
    )
    total = shares.amax(1).reciprocal_()
    logits.copy_(shares)
    return SoftmaxStats(largest, total, chosen, total)
