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
from megatron_ray.kernel import Kernel
from megatron_ray.matmul import forward_product, input_grad_product
from megatron_ray.tensor_parallel.layers import SlottedModule, deliver_linear, start_input_grad_reduction
from megatron_ray.tensor_parallel.norm import widened

# fp32 logits worked on at a time: a share of the last-level cache on CPU; enough to fill the machine on CUDA.
_CHUNK_ELEMENTS = {"cpu": 1024 * 1024, "cuda": 64 * 1024 * 1024}


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
        self.kernel = LOSS

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
        rows = (
            max(1, _CHUNK_ELEMENTS.get(logits.device.type, _CHUNK_ELEMENTS["cuda"]) // logits.shape[1])
            if module.group is None
            else logits.shape[0]
        )
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
        reduced, pending = start_input_grad_reduction(module, grad_hidden)
        grad_weight = deliver_linear(module, gathered, grad_logits)
        pending.wait()
        return reduced, grad_weight, None, None, None


def _softmax_loss_(logits: Tensor, labels: Tensor, mask: Tensor, module: VocabParallelHead, want_grad: bool) -> Tensor:
    """Loss of one chunk of tokens; overwrites `logits` [rows, V] with their gradient when it is wanted."""
    local, owned = labels - module.first_row, None
    if module.group is not None:
        owned = (local >= 0) & (local < logits.shape[1])
        local = local.masked_fill(~owned, 0)
    own_largest, own_total, predicted, kept = module.kernel.forward(logits, local)
    largest = collectives.all_reduce(own_largest.clone(), module.group, dist.ReduceOp.MAX)
    rescale = (own_largest - largest).exp_()
    own_total, predicted = own_total * rescale, predicted - largest
    if module.valid_rows == 0:  # a rank with nothing but padding, whose largest logit is minus infinity
        rescale, own_total = torch.zeros_like(rescale), torch.zeros_like(own_total)
    if owned is not None:
        predicted.masked_fill_(~owned, 0)
    total, predicted = collectives.all_reduce(torch.stack([own_total, predicted]), module.group)
    loss: Tensor = total.log().sub_(predicted).mul_(mask).sum()
    if want_grad:
        hit = mask if owned is None else mask * owned
        module.kernel.backward(logits, own_largest, rescale / total * mask, hit, local, kept)
        if module.valid_rows == 0:
            logits.zero_()
    return loss


def _exponentials(logits: Tensor, local: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Of logits [rows, V]: the largest [rows], the sum of exp(logits - largest), the logit at `local`, all fp32 or wider, and what the
    gradient needs: (shares [rows, V], unit [rows]) with exp(logits - largest) = shares x unit.

    A softmax takes one pass for difference, exponential, sum and quotient, and the largest logit's exponential is one, so its share
    tells the sum. But its exponential on CPU is off by up to 20 units in the last place: good for what is rounded to bf16, not for fp32,
    where the logits are overwritten instead.
    """
    # CPUs reduce bf16 slowly and widen anyway for the softmax; CUDA widens as it reads.
    on_cpu, rounded = logits.device.type == "cpu", logits.dtype.itemsize < 4
    source = widened(logits) if on_cpu else logits
    largest = widened(source.amax(1))
    chosen = widened(source.gather(1, local[:, None]).squeeze(1))
    if on_cpu and not rounded:
        shares = source.sub_(largest[:, None]).exp_()
        return largest, shares.sum(1), chosen, (shares, torch.ones_like(largest))
    shares = torch.softmax(source, 1, out=source) if on_cpu else torch.softmax(source, 1, dtype=largest.dtype)
    total = shares.amax(1).reciprocal_()
    return largest, total, chosen, (shares, total)


def _logits_gradient_(logits: Tensor, largest: Tensor, scale: Tensor, hit: Tensor, local: Tensor, kept: tuple[Tensor, Tensor]) -> None:
    """Writes exp(logits - largest) x scale, less `hit` at `local`, over the logits; all but these and `kept` are [rows]."""
    shares, unit = kept
    shares.mul_((unit * scale)[:, None])
    shares.scatter_add_(1, local[:, None], -hit[:, None])
    if shares is not logits:
        logits.copy_(shares)


LOSS = Kernel(_exponentials, _logits_gradient_)
