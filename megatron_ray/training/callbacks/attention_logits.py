"""Finds the largest attention logit among tokens that see each other.

Owns: that computation, in blocks of queries, for any part of a sequence. Must not know:
ranks, layers.

Shapes: B batch, N query heads, G key/value heads, D head width, S queries, L keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 1 << 24
"""Logits that are computed at once, which bounds the memory to 64 MiB."""


@dataclass(frozen=True)
class Visibility:
    """Which keys each query sees."""

    query_positions_S: Tensor
    """Places in the whole sequence."""
    key_positions_L: Tensor
    window: int | None = None
    """Last tokens that a query sees, itself included; None for all."""
    documents_BL: Tensor | None = None
    """Document of every token of the whole sequence, in natural order; None if tokens of
    all documents are seen."""

    def mask(self, queries: slice) -> Tensor:
        """Returns whether some queries see each key: [queries, L], or [B, 1, 1, ...]."""
        query_S1 = self.query_positions_S[queries, None]
        key_L = self.key_positions_L
        mask = key_L <= query_S1
        if self.window is not None:
            mask = mask & (key_L > query_S1 - self.window)
        if self.documents_BL is None:
            return mask
        of_queries = self.documents_BL[:, self.query_positions_S[queries]]
        is_same = of_queries[:, :, None] == self.documents_BL[:, None, key_L]
        return (mask & is_same)[:, None, None]


def largest_logit(q_BNSD: Tensor, k_BGLD: Tensor, visibility: Visibility) -> Tensor:
    """Returns the largest q k / sqrt(D), an fp32 scalar."""
    batch, heads, _, width = q_BNSD.shape
    # Heads that share a key/value head lie next to each other.
    q_BGXSD = q_BNSD.unflatten(1, (k_BGLD.shape[1], -1))
    k_BG1DL = k_BGLD.float().transpose(-1, -2).unsqueeze(2)
    rows = max(1, _BLOCK // (batch * heads * k_BGLD.shape[2]))
    largest = []
    for start in range(0, q_BNSD.shape[2], rows):
        block = slice(start, start + rows)
        logits = q_BGXSD[..., block, :].float() @ k_BG1DL
        is_unseen = visibility.mask(block).logical_not()
        largest.append(logits.masked_fill_(is_unseen, -torch.inf).amax())
    return torch.stack(largest).amax().mul(float(width) ** -0.5)
