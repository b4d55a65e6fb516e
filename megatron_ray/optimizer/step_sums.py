"""Defines the numbers of a step while they are on the device.

Owns: the order of numbers in the vector that all ranks sum.
"""

from dataclasses import dataclass

from torch import Tensor

NUM_FIXED = 3
"""Loss sum, tokens and squared gradient norm, present for every model."""


@dataclass(frozen=True)
class StepSums:
    """The numbers of one step, summed over the world and so equal on every rank.

    They stay on the device, because reading one would make the host wait for the step's
    end.
    """

    values: Tensor
    """fp64 [loss sum, tokens, squared gradient norm, auxiliary losses ..., votes ...]."""

    @property
    def num_tokens(self) -> Tensor:
        """Number of tokens in the loss."""
        return self.values[1]

    @property
    def squared_norm(self) -> Tensor:
        """Squared L2 norm of the gradients (sums over tokens)."""
        return self.values[2]
