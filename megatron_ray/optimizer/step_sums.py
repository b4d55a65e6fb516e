"""Defines the numbers of a step while they are on the device.

Owns: the order of numbers in the vector that all ranks sum.
"""

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

NUM_FIXED = 3
"""Loss sum, tokens and squared gradient norm, present for every model."""


class SkipRule(Enum):
    """When a step leaves weights and optimizer state as they are."""

    NEVER = "never"
    IF_NOT_FINITE = "if_not_finite"
    """When its loss or gradient norm is not finite."""
    ALWAYS = "always"


@dataclass(frozen=True)
class StepSums:
    """The numbers of one step, summed over the world and so equal on every rank.

    They stay on the device, because reading one would make the host wait for the step's
    end.
    """

    values: Tensor
    """fp64 [loss sum, tokens, squared gradient norm, auxiliary losses ..., votes ...]."""
    skip_rule: SkipRule = SkipRule.NEVER
    loss_scale: Tensor | None = None
    """Scale of the step's loss, an fp64 scalar; None where it is not scaled. The numbers
    above are unscaled."""
    grad_factor: Tensor | None = None
    """Factor of the gradients by that scale."""

    @property
    def skip(self) -> Tensor | None:
        """1.0 if the step is skipped, else 0.0; None for the rule NEVER."""
        if self.skip_rule is SkipRule.NEVER:
            return None
        if self.skip_rule is SkipRule.ALWAYS:
            return torch.ones((), device=self.values.device)
        return self.overflow

    @property
    def overflow(self) -> Tensor:
        """1.0 if the step's loss or gradient norm is not finite, else 0.0."""
        # On the device, so that the host does not wait for the step's end.
        return torch.isfinite(self.values[:NUM_FIXED]).all().logical_not().float()

    @property
    def num_tokens(self) -> Tensor:
        """Number of tokens in the loss."""
        return self.values[1]

    @property
    def squared_norm(self) -> Tensor:
        """Squared L2 norm of the gradients (sums over tokens)."""
        return self.values[2]
