"""Wrong numbers in steps of a run, as faults of the hardware or bad samples cause them.

Only tests can inject them: a loader gives one token of a microbatch another weight in the
loss, on one rank.
"""

from dataclasses import replace
from enum import Enum

import torch

from megatron_ray.data.loader import StepLoader
from megatron_ray.models.batch import Batch


class Fault(Enum):
    """The kinds of faults that a rerun distinguishes."""

    TRANSIENT = "transient"
    """Gone when the step is computed for the second time."""
    PERSISTENT = "persistent"
    """There as long as the rank has the same device."""
    OF_THE_DATA = "of_the_data"
    """There on every device: the result is correct."""


class FaultySteps(StepLoader):
    """A loader with faults in some steps, or in one step of `rate` on average."""

    steps: tuple[int, ...] = ()
    rate: int | None = None
    fault = Fault.OF_THE_DATA
    weight = 1e6
    struck_replica = 0
    is_faulty_device = True
    batch = 8

    def step(self, consumed_samples: int) -> list[Batch]:
        (first, *rest) = super().step(consumed_samples)
        if not self._is_struck(consumed_samples // self.batch + 1):
            return [first, *rest]
        mask = first.loss_mask_BS.clone()
        mask[0, 0] = self.weight
        return [replace(first, loss_mask_BS=mask), *rest]

    def _is_struck(self, step: int) -> bool:
        if self.dp_rank != self.struck_replica:
            return False
        is_due = step in self.steps
        if self.rate is not None:
            generator = torch.Generator().manual_seed(step)
            is_due = int(torch.randint(self.rate, (), generator=generator)) == 0
        if not is_due:
            return False
        if self.fault is Fault.TRANSIENT:
            seen = self.__dict__.setdefault("seen", set())
            is_first = step not in seen
            seen.add(step)
            return is_first
        return self.fault is Fault.OF_THE_DATA or self.is_faulty_device
