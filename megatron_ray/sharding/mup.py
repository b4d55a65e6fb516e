"""Scales the learning rates of parameters under muP and CompleteP.

Owns: which parameters grow with the model, and their factors. Pure Python. Must not know:
optimizers, ranks, the forward pass.
"""

from collections.abc import Sequence
from dataclasses import replace

from megatron_ray.config.model import ModelConfig
from megatron_ray.sharding.parameter_types import (
    LocalParameter,
    LogicalParameter,
    RateFactors,
)

_BLOCKS = ("layers.", "mtp.")
"""Prefixes of the parameters of blocks; the others are those of embeddings, the last norm
and the head."""


def scale_rates(
    table: Sequence[LocalParameter], model: ModelConfig
) -> tuple[LocalParameter, ...]:
    """Returns the table with the factors of `model.mup`."""
    if model.mup is None:
        return tuple(table)
    scaled = []
    for local in table:
        parts = []
        for part in local.parts:
            logical = replace(part.logical, rates=_rates(part.logical, model))
            parts.append(replace(part, logical=logical))
        scaled.append(replace(local, parts=tuple(parts)))
    return tuple(scaled)


def _rates(parameter: LogicalParameter, model: ModelConfig) -> RateFactors:
    """Returns a parameter's factors for Adam (CompleteP, table 1)."""
    width = model.width_ratio
    if not parameter.name.startswith(_BLOCKS):
        # Gradients get smaller with the width, Adam's updates do not.
        return RateFactors(eps=1 / width)
    assert model.mup is not None
    alpha = model.mup.depth_alpha
    depth = model.depth_ratio
    eps = depth**-alpha / width
    lr = depth ** (alpha - 1)
    # Norms and biases have a size that does not grow with their input.
    if not parameter.is_matrix:
        return RateFactors(lr, eps)
    # With its rate divided by the width, a matrix would decay that much less.
    return RateFactors(lr / width, eps, decay=width)
