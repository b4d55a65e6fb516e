"""Samples the next token.

Shapes: V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """The parameters of sampling the next token.

    Raises ValueError for values that exclude all tokens.
    """

    temperature: float = 1.0
    """0: greedy decoding."""
    top_k: int | None = None
    """Sample from this many most likely tokens."""
    top_p: float | None = None
    """Sample from the smallest set of most likely tokens with at least this total
    probability (nucleus sampling, Holtzman et al. 2019)."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature} must be 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be between 0 and 1")


def choose(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Returns one token id; consumes one random number unless temperature is 0."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    # fp64, and a stable sort, so that all devices choose the same.
    ranked, ids = (logits_V.double() / sampling.temperature).sort(
        descending=True, stable=True
    )
    # `None` keeps all tokens.
    probabilities = ranked[: sampling.top_k].softmax(0)
    if sampling.top_p is not None:
        # Mass of the more likely tokens: a token is kept if that mass is below top_p.
        more_likely = probabilities.cumsum(0) - probabilities
        num_kept = max(1, int((more_likely < sampling.top_p).sum()))
        probabilities = probabilities[:num_kept]
    # Instead of normalizing again, the drawn number is scaled.
    cumulative = probabilities.cumsum(0)
    drawn = torch.rand((), dtype=torch.float64, generator=generator) * cumulative[-1]
    index = int(torch.searchsorted(cumulative, drawn, right=True))
    # Rounding may place the drawn number at the end.
    return int(ids[min(index, len(cumulative) - 1)])
