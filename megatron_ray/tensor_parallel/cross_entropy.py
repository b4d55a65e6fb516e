"""Computes the output head and the cross entropy in one step.

The vocabulary is cut over the tensor-parallel group. The loss is the sum of
-log p(label) over tokens. A token's probabilities are its exponentials times one number,
so the exponentials are written over the logits while these are in cache, and the
numbers, which tensor-parallel ranks have to agree on, go into the narrow side of both
products of the backward: no second exponential, no fp32 copy of all logits in bf16, no
pass over the vocabulary once the sums are known. The weight gradient is one product,
delivered to the slot, so a schedule can defer it. Two collectives of T numbers per call.
Must not know: microbatches, loss scaling.

Shapes: T tokens (t of them on this rank under sequence parallelism), H hidden, V this
rank's vocabulary rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_ray.distributed import collectives
from megatron_ray.ops.autograd import AutogradFunction
from megatron_ray.ops.dtypes import to_fp32
from megatron_ray.ops.grad_slots import SlottedModule, deliver_weight_grad
from megatron_ray.ops.loss_chunks import rows_at_once
from megatron_ray.ops.matmul import forward_product, input_grad_product
from megatron_ray.tensor_parallel.embedding import local_ids
from megatron_ray.tensor_parallel.group import TensorParallel
from megatron_ray.tensor_parallel.layers import Shape, start_input_grad_reduction

# A rank whose largest logit is further below the largest of all has probabilities under
# 1e-26; they count as that instead of nothing, so that no quotient overflows.
_FARTHEST = -60.0


class SoftmaxStats(NamedTuple):
    """Describes rows of logits whose memory now holds shares of the softmax.

    exp(logits - largest) = shares x unit. All are [T], fp32 or wider.
    """

    largest: Tensor
    total: Tensor
    """Sum of exp(logits - largest)."""
    label_logit: Tensor
    unit: Tensor


class VocabParallelHead(SlottedModule):
    """Logits and loss over this rank's rows of the vocabulary.

    `valid_rows` of them are no padding; `vocabulary` is the size of the whole, without
    padding; `tied` is the word embedding's weight, where the head shares it.
    """

    def __init__(
        self,
        weight_shape: Shape,
        *,
        valid_rows: int,
        vocabulary: int,
        tp: TensorParallel,
        dtype: torch.dtype,
        tied: nn.Parameter | None = None,
        uses: int = 1,
    ) -> None:
        super().__init__(uses)
        self.tp = tp
        self.valid_rows = valid_rows
        self.vocabulary = vocabulary
        if tied is None:
            tied = nn.Parameter(torch.empty(weight_shape, dtype=dtype))
        self.weight = tied
        self.softmax_shares_: Callable[[Tensor, Tensor], SoftmaxStats] = softmax_shares_

    def forward(self, hidden_TH: Tensor, labels_T: Tensor, mask_T: Tensor) -> Tensor:
        """Returns the sum of mask x -log p(label) over this replica's tokens.

        It is fp32 and the same on every tp rank. Its backward takes the incoming gradient
        to be one: scaling by the number of tokens happens once, in finalize_grads.
        """
        return _HeadLoss.apply(hidden_TH, self.weight, labels_T, mask_T, self)

    def logits(self, hidden_TH: Tensor) -> Tensor:
        """Returns logits [T, vocabulary] on every rank, without padding, for inference."""
        gathered = collectives.all_gather_rows(hidden_TH, self.tp.sequence_group)
        logits = forward_product(gathered, self.weight)
        if self.tp.group is not None:
            # Only rows can be gathered, so the vocabulary is made the rows for it.
            transposed = logits.t().contiguous()
            logits = collectives.all_gather_rows(transposed, self.tp.group).t()
        return logits[:, : self.vocabulary]


class _HeadLoss(AutogradFunction[Tensor]):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        mask: Tensor,
        module: VocabParallelHead,
    ) -> Tensor:
        tp = module.tp
        gathered = collectives.all_gather_rows(hidden, tp.sequence_group)
        logits = forward_product(gathered, weight)
        # Rows of padding must not take part in the softmax.
        if module.valid_rows < logits.shape[1]:
            logits[:, module.valid_rows :] = -torch.inf
        columns, is_elsewhere = local_ids(labels, logits.shape[1], tp)
        local = _overwrite_with_shares(logits, columns, module)
        # Ranks agree on the largest logit first, since sums of exponentials can only be
        # added when they are relative to the same one.
        largest = collectives.all_reduce(local.largest.clone(), tp.group, dist.ReduceOp.MAX)
        rescale = (local.largest - largest).clamp_(min=_FARTHEST).exp_()
        label_logit = local.label_logit - largest
        if is_elsewhere is not None:
            label_logit.masked_fill_(is_elsewhere, 0)
        # Both sums in one collective.
        total, label_logit = collectives.all_reduce(
            torch.stack([local.total * rescale, label_logit]), tp.group
        )
        # The shares are as large as the logits: evaluation must not keep them.
        if any(ctx.needs_input_grad[:2]):
            _subtract_one_hot_(logits, columns, is_elsewhere, local, total / rescale)
            factor = local.unit * rescale / total * mask
            ctx.save_for_backward(gathered, weight, logits, factor)
            ctx.module = module
        loss: Tensor = total.log().sub_(label_logit).mul_(mask).sum()
        return loss

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        # The gradient of the logits is shares x factor, row by row. The factor goes to
        # the [T, H] side of both products instead of to the [T, V] shares.
        gathered, weight, shares, factor = ctx.saved_tensors
        module: VocabParallelHead = ctx.module
        grad_hidden = input_grad_product(shares, weight)
        grad_hidden.mul_(factor[:, None])
        reduced, pending = start_input_grad_reduction(module.tp, grad_hidden)
        # `out` keeps the type of the activations: the factor is wider.
        scaled = torch.mul(gathered, factor[:, None], out=torch.empty_like(gathered))
        grad_weight = deliver_weight_grad(module, scaled, shares)
        pending.wait()
        return reduced, grad_weight, None, None, None


def _overwrite_with_shares(
    logits: Tensor, columns: Tensor, module: VocabParallelHead
) -> SoftmaxStats:
    """Writes shares over the logits [T, V], as many rows at a time as stay in cache."""
    rows = rows_at_once(logits.device.type, logits.shape[1])
    parts = []
    for chunk, chunk_columns in zip(
        torch.split(logits, rows), torch.split(columns, rows), strict=True
    ):
        parts.append(module.softmax_shares_(chunk, chunk_columns))
    stats = SoftmaxStats(*[torch.cat(field) for field in zip(*parts, strict=True)])
    if module.valid_rows > 0:
        return stats
    # A rank with nothing but padding: its largest logit is minus infinity, and what was
    # computed from it is not a number.
    logits.zero_()
    return stats._replace(
        total=torch.zeros_like(stats.total), unit=torch.ones_like(stats.unit)
    )


def _subtract_one_hot_(
    shares: Tensor,
    columns: Tensor,
    is_elsewhere: Tensor | None,
    local: SoftmaxStats,
    one: Tensor,
) -> None:
    """Subtracts one from the label's probability, before it is rounded.

    `one` is a probability of one in exponentials of this rank.
    """
    # In exponentials of this rank, relative to its own largest logit, and then in shares.
    label = ((local.label_logit - local.largest).exp_() - one) / local.unit
    if is_elsewhere is not None:
        unchanged = shares.gather(1, columns[:, None]).squeeze(1)
        label = torch.where(is_elsewhere, unchanged, label)
    shares.scatter_(1, columns[:, None], label.to(shares.dtype)[:, None])


def softmax_shares_(logits: Tensor, columns: Tensor) -> SoftmaxStats:
    """Overwrites logits [rows, V] with shares; `columns` [rows] are those of the labels.

    A softmax takes one pass for difference, exponential, sum and quotient, and the
    largest logit's exponential is one, so its share is one over the sum. But its
    exponential on CPU is off by up to 20 units in the last place: good for what is
    rounded to bf16, not for fp32.
    """
    # CPUs reduce bf16 slowly and widen anyway for the softmax; CUDA widens as it reads.
    on_cpu = logits.device.type == "cpu"
    is_rounded = logits.dtype.itemsize < 4
    source = logits
    if on_cpu:
        source = to_fp32(logits)
    largest = to_fp32(source.amax(1))
    label_logit = to_fp32(source.gather(1, columns[:, None]).squeeze(1))
    if on_cpu and not is_rounded:
        logits.sub_(largest[:, None]).exp_()
        unit = torch.ones_like(largest)
        return SoftmaxStats(largest, logits.sum(1), label_logit, unit)
    if on_cpu:
        shares = torch.softmax(source, 1, out=source)
    else:
        shares = torch.softmax(source, 1, dtype=largest.dtype)
    total = shares.amax(1).reciprocal_()
    logits.copy_(shares)
    return SoftmaxStats(largest, total, label_logit, total)
