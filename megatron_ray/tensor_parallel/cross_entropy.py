"""Computes the output head and the cross entropy in one step.

The vocabulary is sharded over the tensor-parallel group. The loss is the sum of -log
p(label) over tokens. A token's probabilities are its exponentials times one factor. So
exponentials overwrite the logits while these are in cache, and the factors, which
depend on all tensor-parallel ranks, are applied to the narrow operand of both backward
products. This avoids a second exponential, an fp32 copy of bf16 logits, and a pass over
the vocabulary after the reduction. The weight gradient is one product, delivered to the
slot, so a schedule can defer it. Two collectives of T numbers per call. Must not know:
microbatches, loss scaling.

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
from megatron_ray.ops.products import PLAIN
from megatron_ray.tensor_parallel.embedding import local_ids
from megatron_ray.tensor_parallel.group import TensorParallel
from megatron_ray.tensor_parallel.layers import (
    Shape,
    multiply_gathered,
    start_input_grad_reduction,
)

# If a rank's largest logit is further below the global maximum, its probabilities are under
# 1e-26 and are clamped to that, so that no quotient overflows.
_FARTHEST = -60.0
FP16_ONE = 64.0
"""Share of a probability of one in fp16, which rounds smaller ones to multiples of 6e-8:
too few digits for most tokens of a large vocabulary."""


class SoftmaxStats(NamedTuple):
    """Softmax statistics of rows of logits that have been overwritten with shares.

    exp(logits - largest) = shares x unit. All are [T], fp32 or wider.
    """

    largest: Tensor
    total: Tensor
    """Sum of exp(logits - largest)."""
    label_logit: Tensor
    unit: Tensor


class VocabParallelHead(SlottedModule):
    """Logits and loss over this rank's rows of the vocabulary.

    `valid_rows` of them are not padding; `vocabulary` is the global size without
    padding; `tied` is the word embedding's weight, if the head shares it.
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
        self.grad_scale: Callable[[], Tensor] | None = None
        """Factor of the loss's gradient, where the losses are scaled."""
        self.softmax_shares_: Callable[[Tensor, Tensor], SoftmaxStats] = softmax_shares_

    def forward(self, hidden_TH: Tensor, labels_T: Tensor, mask_T: Tensor) -> Tensor:
        """Returns the sum of mask x -log p(label) over this replica's tokens.

        It is fp32 and the same on every tp rank. Its backward assumes an incoming
        gradient of one, because finalize_grads scales by the number of tokens, and
        multiplies by `grad_scale`.
        """
        return _HeadLoss.apply(hidden_TH, self.weight, labels_T, mask_T, self)

    def scaled(self, factor_T: Tensor) -> Tensor:
        """Returns factors of the gradients of tokens, times that of the loss."""
        if self.grad_scale is None:
            return factor_T
        return factor_T * self.grad_scale()

    def logits(self, hidden_TH: Tensor) -> Tensor:
        """Returns logits [T, vocabulary] on every rank, without padding, for inference."""
        gathered = collectives.all_gather_rows(hidden_TH, self.tp.sequence_group)
        logits = forward_product(gathered, self.weight)
        if self.tp.group is not None:
            # Transposed, because only rows can be gathered.
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
        gathered, logits = multiply_gathered(tp, PLAIN, hidden, weight)
        # Padding rows are excluded from the softmax.
        if module.valid_rows < logits.shape[1]:
            logits[:, module.valid_rows :] = -torch.inf
        columns, is_elsewhere = local_ids(labels, logits.shape[1], tp)
        local = _overwrite_with_shares(logits, columns, module)
        # The largest logit is reduced first, because sums of exponentials can only be added
        # relative to the same maximum.
        largest = collectives.all_reduce(local.largest.clone(), tp.group, dist.ReduceOp.MAX)
        rescale = (local.largest - largest).clamp_(min=_FARTHEST).exp_()
        label_logit = local.label_logit - largest
        if is_elsewhere is not None:
            label_logit.masked_fill_(is_elsewhere, 0)
        # Both sums in one collective.
        total, label_logit = collectives.all_reduce(
            torch.stack([local.total * rescale, label_logit]), tp.group
        )
        # Shares are as large as the logits, so evaluation must not save them.
        if any(ctx.needs_input_grad[:2]):
            local = _within_range_(logits, local, total / rescale)
            _subtract_one_hot_(logits, columns, is_elsewhere, local, total / rescale)
            factor = module.scaled(local.unit * rescale / total * mask)
            ctx.save_for_backward(gathered, weight, logits, factor)
            ctx.module = module
        loss: Tensor = total.log().sub_(label_logit).mul_(mask).sum()
        return loss

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        # The gradient of the logits is shares x factor per row. The factor is applied to
        # the [T, H] operand of both products instead of the [T, V] shares.
        gathered, weight, shares, factor = ctx.saved_tensors
        module: VocabParallelHead = ctx.module
        grad_hidden = input_grad_product(shares, weight)
        grad_hidden.mul_(factor[:, None])
        reduced, pending = start_input_grad_reduction(module.tp, grad_hidden)
        # `out` keeps the type of the activations, since the factor is wider.
        scaled = torch.mul(gathered, factor[:, None], out=torch.empty_like(gathered))
        grad_weight = deliver_weight_grad(module, scaled, shares)
        pending.wait()
        return reduced, grad_weight, None, None, None


def _overwrite_with_shares(
    logits: Tensor, columns: Tensor, module: VocabParallelHead
) -> SoftmaxStats:
    """Overwrites the logits [T, V] with shares, in groups of rows that fit in cache."""
    rows = rows_at_once(logits.device.type, logits.shape[1])
    parts = []
    for chunk, chunk_columns in zip(
        torch.split(logits, rows), torch.split(columns, rows), strict=True
    ):
        parts.append(module.softmax_shares_(chunk, chunk_columns))
    stats = SoftmaxStats(*[torch.cat(field) for field in zip(*parts, strict=True)])
    if module.valid_rows > 0:
        return stats
    # A rank with padding only has a maximum of -inf, from which the results are NaN.
    logits.zero_()
    return stats._replace(
        total=torch.zeros_like(stats.total), unit=torch.ones_like(stats.unit)
    )


def _within_range_(shares: Tensor, local: SoftmaxStats, one: Tensor) -> SoftmaxStats:
    """Makes a probability of one the same share on all ranks, in fp16.

    Relative to a rank with small logits only, a label's share is beyond its range. `one` is
    a probability of one in exponentials of this rank.
    """
    if shares.dtype != torch.float16:
        return local
    unit = one / FP16_ONE
    shares.mul_((local.unit / unit)[:, None])
    return local._replace(unit=unit)


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
    # Converts to exponentials relative to this rank's largest logit, then to shares.
    label = ((local.label_logit - local.largest).exp_() - one) / local.unit
    if is_elsewhere is not None:
        unchanged = shares.gather(1, columns[:, None]).squeeze(1)
        label = torch.where(is_elsewhere, unchanged, label)
    shares.scatter_(1, columns[:, None], label.to(shares.dtype)[:, None])


def softmax_shares_(logits: Tensor, columns: Tensor) -> SoftmaxStats:
    """Overwrites logits [rows, V] with shares; `columns` [rows] are label columns.

    A softmax needs one pass for difference, exponential, sum and quotient, and the
    largest logit's exponential is one, so its share is one over the sum. But its
    exponential on CPU has errors of up to 20 units in the last place: accurate enough
    for bf16, not for fp32.
    """
    # CPUs reduce bf16 slowly, and softmax needs fp32 anyway; CUDA converts while reading.
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
    unit = total
    if logits.dtype == torch.float16:
        shares.mul_(FP16_ONE)
        unit = total / FP16_ONE
    logits.copy_(shares)
    return SoftmaxStats(largest, total, label_logit, unit)
