"""Dropout (Srivastava et al. 2014).

Owns: the mask and its place in the arithmetic. Must not know: ranks, groups.

Masks are functions of the stream and of the batch's first sample, so a second forward
of the same microbatch drops the same. Without a sample (evaluation, generation) nothing
is dropped; where the rate is 0 there is no module at all.

Shapes: T tokens, H hidden, B batch, S sequence, N query heads, G key/value heads, D
head width.
"""

import torch
from torch import Tensor, nn

from megatron_ray.distributed.rng import Stream
from megatron_ray.models.batch import Packed
from megatron_ray.ops.attention.fused import band_bias


class Dropout(nn.Module):
    """Sets a share `rate` of its input to zero and divides the rest by 1 - rate."""

    def __init__(self, rate: float, stream: Stream) -> None:
        super().__init__()
        self.rate = rate
        self.stream = stream

    def mask(self, like: Tensor, first_sample: int) -> Tensor:
        """True where dropped."""
        dropped = torch.empty_like(
            like, dtype=torch.bool, memory_format=torch.contiguous_format
        )
        return dropped.bernoulli_(
            self.rate, generator=self.stream.at(first_sample, like.device)
        )

    def forward(self, fresh_TH: Tensor, first_sample: int) -> Tensor:
        """In place: `fresh_TH` must be a result that nobody else reads, or keeps for a
        backward pass.
        """
        return fresh_TH.masked_fill_(self.mask(fresh_TH, first_sample), 0).mul_(
            1 / (1 - self.rate)
        )


class AttentionWithDropout(nn.Module):
    """Causal attention with dropout on its probabilities, by plain products: scores [B,
    N, S, S] are made in full.

    torch's fused attention draws from its global generator, and the blocks of bf16 on
    CPU drop nothing.
    """

    def __init__(self, rate: float, stream: Stream, window: int | None = None) -> None:
        super().__init__()
        self.dropout = Dropout(rate, stream)
        self.window = window

    def forward(
        self,
        q_BNSD: Tensor,
        k_BGSD: Tensor,
        v_BGSD: Tensor,
        about: tuple[Packed | None, int],
    ) -> Tensor:
        """`about`: the batch's documents, if they are apart, and its first sample."""
        packed, first_sample = about
        (batch, heads, sequence, width) = q_BNSD.shape
        groups = k_BGSD.shape[1]
        # The heads that share keys lie together: one product for all of them.
        queries = q_BNSD.reshape(batch, groups, -1, width)
        scores = torch.matmul(queries, k_BGSD.transpose(2, 3)).view(
            batch, heads, sequence, sequence
        )
        wide = scores.float() if scores.dtype.itemsize < 4 else scores
        hidden = _hidden(sequence, self.window, packed, wide)
        probabilities = torch.softmax(wide.mul(width**-0.5).add_(hidden), -1)
        dropped = probabilities.to(q_BNSD.dtype).masked_fill(
            self.dropout.mask(probabilities, first_sample), 0
        )
        attended = torch.matmul(dropped.view(batch, groups, -1, sequence), v_BGSD)
        return attended.mul_(1 / (1 - self.dropout.rate)).view(q_BNSD.shape)


def _hidden(
    sequence: int, window: int | None, packed: Packed | None, like: Tensor
) -> Tensor:
    """What is added to scores: minus infinity for later tokens, for those out of the
    window and, where documents are apart, for other documents'.
    """
    hidden = band_bias(sequence, sequence, 0, window or sequence, like)
    if packed is None:
        return hidden
    other = packed.documents_BS[:, None, :, None] != packed.documents_BS[:, None, None, :]
    return hidden.masked_fill(other, -torch.inf)
