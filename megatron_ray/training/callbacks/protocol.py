"""Defines what a callback is: what it is given, and what it returns.

Owns: the interface of callbacks, for ours and for those of installed packages. Must not
know: any callback.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_ray.config.base import Config
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.models.batch import Batch
from megatron_ray.optimizer.sharded import ShardedOptimizer
from megatron_ray.optimizer.step_sums import StepSums
from megatron_ray.parallelize.parallelize import ParallelModel

NOTHING = torch.empty(0, dtype=torch.float64)
"""The part of a callback that adds nothing to a reduction."""


@dataclass(frozen=True, slots=True)
class CallbackContext:
    """What a callback may look at on its rank."""

    config: TrainConfig
    """The resolved config."""
    mesh: ParallelMesh
    model: ParallelModel
    optimizer: ShardedOptimizer


@dataclass(frozen=True, slots=True)
class Partials:
    """What one rank knows of a step; the runner reduces it over all ranks.

    Both are 1-D, fp64, on the rank's device, and as long on every rank.
    """

    sums: Tensor = field(default=NOTHING)
    """Added up over ranks. What several ranks have must be counted on one of them only."""
    maxima: Tensor = field(default=NOTHING)
    """Of these the largest over ranks is kept; -inf where a rank has none."""


class Callback:
    """Watches the steps of a run on one rank, and changes nothing in it.

    Its numbers are due in some steps, on all ranks alike. The methods of a due step are
    called in this order: `observe`, `begin_step`, `after_backward`, `after_update`,
    `finish`; in other steps only `observe` is. All are called without gradients, and must
    not wait for the device: no `.item()`, no branch on a tensor.
    """

    names: Sequence[str] = ()
    """Names of its numbers, the same on every rank."""

    def observe(self, batches: Sequence[Batch]) -> None:
        """Takes this replica's microbatches of every step, before the forward pass."""

    def begin_step(self) -> None:
        """Prepares for a due step; hooks that it registers must go in `after_backward`."""

    def after_backward(self, sums: StepSums) -> None:
        """Looks at complete gradients, which are sums over tokens, before clipping.

        `sums` are the numbers of the ranks that take the step together.
        """

    def after_update(self) -> Partials:
        """Returns this rank's part of the numbers, after the update."""
        return Partials()

    def finish(self, reduced: Partials) -> Tensor:
        """Returns the numbers [names], fp64, from what all ranks have together."""
        return reduced.sums

    def before_save(self) -> None:
        """Completes the state, on all ranks at once."""

    def state(self) -> Mapping[str, Tensor]:
        """Returns live tensors that a resumed run continues from.

        They are the same on every rank after `before_save`, whatever the layout.
        """
        return {}


MakeCallback = Callable[[CallbackContext, Config | None], Callback]
"""What an installed package names: it gets its options, None without any."""
