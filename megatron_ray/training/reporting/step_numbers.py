"""Reads the numbers of steps from the device without stalling it.

Owns: the transfer of a step's sums on the device to numbers on the host.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, sqrt
from typing import Self

import torch
from torch import Tensor

from megatron_ray.commands import (
    NUM_VOTES,
    Command,
    all_sent,
    marked_ranks,
    strongest_voted,
)
from megatron_ray.distributed import device
from megatron_ray.distributed.activity import DEVICE, PROCESS, Operation
from megatron_ray.optimizer.step_sums import NUM_FIXED, StepSums
from megatron_ray.training.callbacks.runner import Monitored
from megatron_ray.training.progress import Progress
from megatron_ray.training.reporting.step_timer import PendingTimes, StepTimes


@dataclass(frozen=True)
class HostNumbers:
    """The numbers of a step that are this rank's own."""

    progress: Progress
    """Progress after this step."""
    lr: float
    times: StepTimes
    """As this rank has measured them; on CUDA they arrive with the sums."""
    memory_bytes: int
    """Peak so far; device memory, or the process's on CPU."""
    weight_decay: float | None = None
    """None where every step has the same."""


@dataclass(frozen=True)
class StepNumbers:
    """All numbers of one step; those from the device are equal on every rank."""

    host: HostNumbers
    num_tokens: float
    """Tokens that counted in the loss, all ranks; a whole number."""
    loss: float
    """Mean over those tokens, as are the other losses; nats."""
    grad_norm: float
    """L2 norm of the mean gradient, before clipping."""
    other_losses: tuple[float, ...]
    """The auxiliary losses, in the model's order."""
    command: Command
    """The strongest command that any rank had received at the end of the step."""
    all_sent: bool = True
    """Whether every rank's last copy had arrived at its partner by then."""
    loss_scale: float | None = None
    """Scale of the loss; None where it is not scaled."""
    broken_rule: int | None = None
    """Index of the rule that the step breaks."""
    limit: float = inf
    """What that rule has compared with."""
    faulty_ranks: tuple[int, ...] = ()
    """Ranks whose own loss or gradients were not finite, where a rule has them checked."""
    monitored: Mapping[str, float] = field(default_factory=dict)
    """Numbers of the callbacks that were due, by name."""

    @classmethod
    def from_sums(
        cls,
        host: HostNumbers,
        sums: Sequence[float],
        num_aux: int,
        loss_scale: float | None = None,
        verdict: Sequence[float] = (),
    ) -> Self:
        """Converts sums over the world to means; see StepSums for their order.

        `verdict` are which rules are broken, and then their limits.
        """
        loss_sum, num_tokens, squared_norm = sums[:NUM_FIXED]
        votes_start = NUM_FIXED + num_aux
        marks_start = votes_start + NUM_VOTES
        votes = sums[votes_start:marks_start]
        # A step may have no tokens in the loss, when all its documents are padding.
        divisor = max(num_tokens, 1.0)
        broken = list(verdict[: len(verdict) // 2])
        broken_rule = None
        limit = inf
        if any(broken):
            broken_rule = broken.index(1.0)
            limit = verdict[len(broken) + broken_rule]
        return cls(
            host,
            num_tokens,
            loss_sum / divisor,
            sqrt(squared_norm) / divisor,
            tuple(aux_sum / divisor for aux_sum in sums[NUM_FIXED:votes_start]),
            strongest_voted(votes),
            all_sent(votes),
            loss_scale,
            broken_rule,
            limit,
            marked_ranks(sums[marks_start:]),
        )


@dataclass(frozen=True)
class _Launched:
    """A launched step."""

    progress: Progress
    lr: float
    times: PendingTimes
    memory_bytes: int
    read: Callable[[], list[float]]
    """Waits for the numbers: the sums, a loss scale, a verdict, callbacks' numbers."""
    has_loss_scale: bool
    num_verdict: int
    """Numbers of the verdict."""
    monitored: tuple[str, ...]
    """Names of the last numbers."""
    weight_decay: float | None


class StepsInFlight:
    """The launched steps with numbers that have not been read.

    Numbers are read at once on CPU, and one step later on CUDA, where waiting for the
    newest step would let the device's queue run empty.
    """

    def __init__(self, on: torch.device, num_aux: int) -> None:
        self._device = on
        self._num_aux = num_aux
        self._lag = 0
        if on.type == "cuda":
            self._lag = 1
        self._queue: deque[_Launched] = deque()

    def add(
        self,
        progress: Progress,
        lr: float,
        times: PendingTimes,
        sums: StepSums,
        monitored: Monitored | None = None,
        weight_decay: float | None = None,
    ) -> None:
        """Adds a step that was just launched and starts copying its sums to the host."""
        # The peak is that at the launch of the step.
        memory_bytes = device.peak_memory_bytes(self._device)
        values = sums.values
        if sums.loss_scale is not None:
            values = torch.cat([values, sums.loss_scale[None]])
        num_verdict = 0
        if sums.verdict is not None:
            values = torch.cat([values, sums.verdict.broken, sums.verdict.limits])
            num_verdict = 2 * len(sums.verdict.broken)
        names: tuple[str, ...] = ()
        if monitored is not None:
            names = monitored.names
            values = torch.cat([values, monitored.values])
        self._queue.append(
            _Launched(
                progress,
                lr,
                times,
                memory_bytes,
                start_copy_to_host(values),
                sums.loss_scale is not None,
                num_verdict,
                names,
                weight_decay,
            )
        )

    def pop_arrived(self) -> list[StepNumbers]:
        """Returns the steps whose numbers have arrived: all but the newest on CUDA."""
        return self._pop(keep=self._lag)

    def pop_all(self) -> list[StepNumbers]:
        """Returns all remaining steps; waits for the device."""
        return self._pop(keep=0)

    def _pop(self, keep: int) -> list[StepNumbers]:
        steps = []
        while len(self._queue) > keep:
            launched = self._queue.popleft()
            values = launched.read()
            end = len(values) - len(launched.monitored)
            monitored = dict(zip(launched.monitored, values[end:], strict=True))
            del values[end:]
            end = len(values) - launched.num_verdict
            verdict = values[end:]
            del values[end:]
            loss_scale = None
            if launched.has_loss_scale:
                loss_scale = values.pop()
            host = HostNumbers(
                launched.progress,
                launched.lr,
                # Marked before the copy was started, so they have arrived with it.
                launched.times.read(),
                launched.memory_bytes,
                launched.weight_decay,
            )
            numbers = StepNumbers.from_sums(
                host, values, self._num_aux, loss_scale, verdict
            )
            steps.append(replace(numbers, monitored=monitored))
        return steps


def start_copy_to_host(values: Tensor) -> Callable[[], list[float]]:
    """Starts copying device scalars to the host; calling the result waits for the copy.

    No wait is needed on CPU.
    """
    if values.device.type != "cuda":
        return values.tolist
    # Only a copy into pinned memory is asynchronous. The event, unlike the stream, does not
    # wait for kernels that are launched after it.
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[float]:
        # A hung collective of NCCL stops the host here.
        started = PROCESS.begin_wait(Operation.of(DEVICE))
        copied.synchronize()
        PROCESS.end_wait(started)
        numbers: list[float] = host.tolist()
        return numbers

    return read
