"""Updates synchronized weights by the outer optimizer of DiLoCo (Douillard et al. 2023).

Owns: the last synchronized weights and the momentum. Must not know: the groups.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ray.config.local_sgd import OuterOptimizerConfig


class OuterUpdate:
    """SGD, by torch's rule, on the difference to the last synchronized weights.

    `weights` are live flat views of main parameters. The difference is one between fp32
    numbers, so that lr=1 without momentum gives the mean up to rounding only.
    """

    def __init__(self, config: OuterOptimizerConfig, weights: Sequence[Tensor]) -> None:
        self._config = config
        self._weights = weights
        self._synced = [torch.zeros_like(flat) for flat in weights]
        self._momentum: list[Tensor] = []
        if config.momentum > 0:
            self._momentum = [torch.zeros_like(flat) for flat in weights]

    def begin(self) -> None:
        """Takes the current weights for the last synchronized ones."""
        for synced, weights in zip(self._synced, self._weights, strict=True):
            synced.copy_(weights)

    def step(self) -> None:
        """Replaces the weights, which are the groups' mean, by the updated ones."""
        for index, synced in enumerate(self._synced):
            weights = self._weights[index]
            direction = synced - weights
            if self._momentum:
                direction = self._with_momentum(self._momentum[index], direction)
            synced.sub_(direction, alpha=self._config.lr)
            weights.copy_(synced)

    def _with_momentum(self, momentum: Tensor, gradient: Tensor) -> Tensor:
        """Adds the gradient to the momentum; returns the direction of the update."""
        momentum.mul_(self._config.momentum).add_(gradient)
        if self._config.nesterov:
            return gradient.add_(momentum, alpha=self._config.momentum)
        return momentum

    def state(self) -> dict[str, list[Tensor]]:
        """Returns the live state by name, in the order of the weights."""
        state = {"weights": self._synced}
        if self._momentum:
            state["momentum"] = self._momentum
        return state
