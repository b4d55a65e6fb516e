"""Holds the numbers of a step while they are on the device.

Owns: the order of numbers in the vector that is summed over all ranks.
"""

from dataclasses import dataclass

from torch import Tensor

NUM_FIXED = 3
"""Loss sum, tokens and squared gradient norm, which every model has."""


@dataclass(frozen=True)
class StepSums:
    """One step's numbers, summed over the world and so the same on every rank.

    They stay on the device: reading one there and then would make the host wait for the
    step to end.
    """

    values: Tensor
    """fp64 [loss sum, tokens, squared gradient norm, auxiliary losses ..., votes ...]."""

    @property
    def num_tokens(self) -> Tensor:
        """Tokens that count in the loss."""
        return self.values[1]

    @property
    def squared_norm(self) -> Tensor:
        """Squared L2 norm of the gradients, which are sums over tokens here."""
        return self.values[2]
