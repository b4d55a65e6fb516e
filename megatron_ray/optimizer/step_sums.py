"""Defines the numbers of a step while they are on the device.

Owns: the order of numbers in the vector that all ranks sum.
"""

from dataclasses import dataclass, replace
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
class Verdict:
    """What the rules of a run make of one step, on the device."""

    skip: Tensor
    """1.0 if the step leaves weights and optimizer state as they are, else 0.0."""
    halted: Tensor
    """Whether the run leaves off at this step or has left off before: a bool scalar."""
    broken: Tensor
    """1.0 for the rule that the step breaks, 0.0 for all others; fp64."""
    limits: Tensor
    """What each rule has compared with, fp64."""


@dataclass(frozen=True)
class StepSums:
    """The numbers of one step, summed over the world and so equal on every rank.

    They stay on the device, because reading one would make the host wait for the step's
    end.
    """

    values: Tensor
    """fp64 [loss sum, tokens, squared gradient norm, auxiliary losses ..., votes ..., marks
    of ranks ...], the last only where a rule checks gradients before their reduction."""
    skip_rule: SkipRule = SkipRule.NEVER
    loss_scale: Tensor | None = None
    """Scale of the step's loss, an fp64 scalar; None where it is not scaled. The numbers
    above are unscaled."""
    grad_factor: Tensor | None = None
    """Factor of the gradients by that scale."""
    verdict: Verdict | None = None
    """That of the run's rules; None without rules, and for a step that is left out."""
    group_values: Tensor | None = None
    """The same numbers of this rank's replica group only; None where there is one group."""

    @property
    def of_group(self) -> "StepSums":
        """The sums over the ranks whose gradients are reduced together."""
        if self.group_values is None:
            return self
        return replace(self, values=self.group_values, group_values=None)

    @property
    def skip(self) -> Tensor | None:
        """1.0 if the step is skipped, else 0.0; None for the rule NEVER without a verdict."""
        if self.skip_rule is SkipRule.ALWAYS:
            return torch.ones((), device=self.values.device)
        if self.verdict is None:
            if self.skip_rule is SkipRule.NEVER:
                return None
            return self.overflow
        if self.skip_rule is SkipRule.NEVER:
            return self.verdict.skip
        return torch.maximum(self.overflow, self.verdict.skip)

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
    def loss(self) -> Tensor:
        """Mean loss of a token."""
        return self.values[0] / self.num_tokens.clamp(min=1.0)

    @property
    def grad_norm(self) -> Tensor:
        """L2 norm of the mean gradient, before clipping."""
        return self.squared_norm.sqrt() / self.num_tokens.clamp(min=1.0)

    @property
    def squared_norm(self) -> Tensor:
        """Squared L2 norm of the gradients (sums over tokens)."""
        return self.values[2]
