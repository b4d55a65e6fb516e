"""Reads the numbers of steps from the device, late enough not to wait for it.

Owns: the way from a step's sums on the device to its numbers on the host.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Self

import torch
from torch import Tensor

from megatron_ray.commands import Command, strongest_voted
from megatron_ray.distributed import device
from megatron_ray.optimizer.step_sums import NUM_FIXED, StepSums
from megatron_ray.training.progress import Progress
from megatron_ray.training.step_timer import StepTimes


@dataclass(frozen=True)
class HostNumbers:
    """The numbers of a step that the host knows when it has launched it."""

    progress: Progress
    """This step included."""
    lr: float
    times: StepTimes
    memory_bytes: int
    """Peak so far; device memory, or the process's on CPU."""


@dataclass(frozen=True)
class StepNumbers:
    """All numbers of one step, those of the device the same on every rank."""

    host: HostNumbers
    num_tokens: float
    """Tokens that counted in the loss, all ranks; a whole number."""
    loss: float
    """Mean over those tokens, as are the other losses; nats."""
    grad_norm: float
    """L2 norm of the mean gradient, before clipping."""
    other_losses: tuple[float, ...]
    """The model's auxiliary losses, in its order."""
    command: Command
    """The strongest one that any rank had got when the step ended."""

    @classmethod
    def from_sums(cls, host: HostNumbers, sums: Sequence[float], num_aux: int) -> Self:
        """Turns sums over the world into means; see StepSums for their order."""
        loss_sum, num_tokens, squared_norm = sums[:NUM_FIXED]
        votes_start = NUM_FIXED + num_aux
        # A step may have no token that counts, when all its documents are padding.
        divisor = max(num_tokens, 1.0)
        return cls(
            host,
            num_tokens,
            loss_sum / divisor,
            sqrt(squared_norm) / divisor,
            tuple(aux_sum / divisor for aux_sum in sums[NUM_FIXED:votes_start]),
            strongest_voted(sums[votes_start:]),
        )


class StepsInFlight:
    """The steps that have been launched and whose numbers were not read yet.

    Numbers are read when they are complete: at once on CPU, one step later on CUDA, where
    the device's queue would otherwise run empty while the host waits for the newest.
    """

    def __init__(self, on: torch.device, num_aux: int) -> None:
        self._device = on
        self._num_aux = num_aux
        self._lag = 0
        if on.type == "cuda":
            self._lag = 1
        self._queue: deque[tuple[HostNumbers, Callable[[], list[float]]]] = deque()

    def add(self, progress: Progress, lr: float, times: StepTimes, sums: StepSums) -> None:
        """Adds a step that was just launched and starts copying its sums to the host."""
        # The peak belongs to the moment at which the step was launched, not read.
        memory_bytes = device.peak_memory_bytes(self._device)
        host = HostNumbers(progress, lr, times, memory_bytes)
        self._queue.append((host, start_copy_to_host(sums.values)))

    def pop_arrived(self) -> list[StepNumbers]:
        """Returns the steps whose numbers have arrived: all but the newest on CUDA."""
        return self._pop(keep=self._lag)

    def pop_all(self) -> list[StepNumbers]:
        """Returns every step that is left; waits for the device."""
        return self._pop(keep=0)

    def _pop(self, keep: int) -> list[StepNumbers]:
        steps = []
        while len(self._queue) > keep:
            host, read = self._queue.popleft()
            steps.append(StepNumbers.from_sums(host, read(), self._num_aux))
        return steps


def start_copy_to_host(values: Tensor) -> Callable[[], list[float]]:
    """Starts copying device scalars to the host; calling the result waits for the copy.

    On CPU there is nothing to wait for.
    """
    if values.device.type != "cuda":
        return values.tolist
    # Only a copy into pinned memory leaves the host free. The event, unlike a wait for
    # the stream, ends before the kernels that were launched after it.
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[float]:
        copied.synchronize()
        numbers: list[float] = host.tolist()
        return numbers

    return read
