"""Defines dropout (Srivastava et al. 2014).

Owns: the masks and their application. Must not know: ranks, groups.

Masks are functions of the stream and of the batch's first sample, so a second forward
of the same microbatch drops the same elements. With rate 0 no module is created.

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
        """Returns a mask in the shape of `like`, True where elements are dropped."""
        # Contiguous for any `like`, so that elements get the same numbers in any memory
        # format.
        mask = torch.empty_like(
            like, dtype=torch.bool, memory_format=torch.contiguous_format
        )
        generator = self.stream.at(first_sample, like.device)
        return mask.bernoulli_(self.rate, generator=generator)

    def forward(self, fresh_TH: Tensor, first_sample: int) -> Tensor:
        """Drops in place.

        `fresh_TH` must be a result that nothing else reads and that autograd does not
        save.
        """
        mask = self.mask(fresh_TH, first_sample)
        return fresh_TH.masked_fill_(mask, 0).mul_(1 / (1 - self.rate))


class AttentionWithDropout(nn.Module):
    """Causal attention with dropout on its probabilities.

    Matrix products compute all scores [B, N, S, S]. The fused kernels cannot be used:
    torch's draws masks from the global generator, and the blockwise one for bf16 on CPU
    has no dropout.
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
        packed: Packed | None,
        first_sample: int,
    ) -> Tensor:
        """Returns the attention outputs [B, N, S, D]."""
        batch, heads, sequence, width = q_BNSD.shape
        groups = k_BGSD.shape[1]
        # Heads that share keys are adjacent, so one product computes their scores.
        queries = q_BNSD.reshape(batch, groups, -1, width)
        scores = torch.matmul(queries, k_BGSD.transpose(2, 3)).view(
            batch, heads, sequence, sequence
        )
        # A softmax in bf16 would round its sums.
        if scores.dtype.itemsize < 4:
            scores = scores.float()
        bias = _causal_bias(sequence, self.window, packed, scores)
        probabilities = torch.softmax(scores.mul(width**-0.5).add_(bias), -1)
        # Division by 1 - rate happens below, which saves a pass over all scores.
        dropped = probabilities.to(q_BNSD.dtype).masked_fill(
            self.dropout.mask(probabilities, first_sample), 0
        )
        attended = torch.matmul(dropped.view(batch, groups, -1, sequence), v_BGSD)
        # Scaled after the product with values, which has fewer elements than the scores.
        return attended.mul_(1 / (1 - self.dropout.rate)).view(q_BNSD.shape)


def _causal_bias(
    sequence: int, window: int | None, packed: Packed | None, like: Tensor
) -> Tensor:
    """Returns the bias of scores: -inf for masked tokens.

    Masked are later tokens, tokens before the window and tokens of other packed
    documents.
    """
    # Without a window the band is as wide as the sequence, which is causal attention.
    bias = band_bias(sequence, sequence, 0, window or sequence, like)
    if packed is None:
        return bias
    documents = packed.documents_BS
    is_other = documents[:, None, :, None] != documents[:, None, None, :]
    return bias.masked_fill(is_other, -torch.inf)
