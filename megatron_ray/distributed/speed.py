"""Measures how fast a rank's device and its links are.

Owns: the sizes, the repetitions and the arithmetic of each measurement. Must not know:
nodes, what counts as slow, what follows.

The members of a group measure together: each calls the same method with its group. A
measurement repeats its work for a fixed time, which the members agree on, and returns the
median of some rounds, so that a moment of other load does not decide.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import torch.distributed as dist

from megatron_ray.distributed import collectives, device
from megatron_ray.distributed.collectives import Group

_ROUNDS = 5
_MAX_CALLS = 1000
_CHECKED_ROWS = 4
_TOLERANCES = {torch.float32: 5e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Largest error of a product, as a share of its largest element, by the type of its
factors. That of fp32 allows TF32."""


@dataclass(frozen=True)
class Sizes:
    """What is measured on one kind of device."""

    rows: int
    """Rows and columns of the factors of a product."""
    memory_bytes: int
    """Size of a tensor that is copied: larger than all caches."""
    message_bytes: int
    """Size of a message and of a reduced tensor."""
    seconds: float
    """Time of one measurement."""


SIZES = {
    "cuda": Sizes(8192, 1 << 30, 256 << 20, 1.0),
    "cpu": Sizes(512, 32 << 20, 4 << 20, 0.2),
}


@dataclass(frozen=True)
class ProductSpeed:
    """Speed and correctness of a device's matrix products."""

    flops: float
    """Floating-point operations per second."""
    problem: str | None
    """What is wrong with the results; None: nothing."""


class SpeedTest:
    """The measurements of one rank.

    `clock` returns seconds of a monotonic clock; `sizes` are those of the kind of device.
    """

    def __init__(
        self,
        torch_device: torch.device,
        dtype: torch.dtype,
        clock: Callable[[], float] = perf_counter,
        sizes: Sizes | None = None,
    ) -> None:
        self._device = torch_device
        self._dtype = dtype
        self._clock = clock
        self._sizes = sizes or SIZES[torch_device.type]

    @property
    def device_name(self) -> str:
        """The name of the device, which equal devices share."""
        return _device_name(self._device)

    def products(self) -> ProductSpeed:
        """Measures square products, and compares their results with each other.

        All ranks multiply the same factors.
        """
        rows = self._sizes.rows
        generator = torch.Generator(self._device).manual_seed(0)
        shape = (2, rows, rows)
        factors = torch.randn(shape, generator=generator, device=self._device)
        left, right = factors.to(self._dtype)
        first = left @ right
        last = torch.empty_like(first)
        seconds = self._seconds_per_call(lambda: torch.mm(left, right, out=last))
        return ProductSpeed(2 * rows**3 / seconds, _problem(left, right, first, last))

    def memory(self) -> float:
        """Returns the bytes per second that copies read and write."""
        num_bytes = self._sizes.memory_bytes
        source = torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)
        target = torch.empty_like(source)
        return 2 * num_bytes / self._seconds_per_call(lambda: target.copy_(source))

    def all_reduce(self, group: Group) -> float:
        """Returns the bus bandwidth of all-reduces, in bytes per second.

        It is the bandwidth of each rank's link, whatever the number of ranks.
        """
        tensor = self._message()

        def work() -> object:
            return collectives.all_reduce(tensor, group)

        ranks = collectives.size(group)
        share = 2 * (ranks - 1) / ranks
        return share * tensor.nbytes / self._seconds_per_call(work, group)

    def exchange(self, group: Group) -> float:
        """Returns the bytes per second in each direction between the group's two ranks."""
        outgoing = self._message()
        incoming = torch.empty_like(outgoing)
        peer = 1 - collectives.rank(group)

        def work() -> object:
            return collectives.start_exchange(outgoing, peer, incoming, peer, group).wait()

        return outgoing.nbytes / self._seconds_per_call(work, group)

    def _message(self) -> torch.Tensor:
        num_elements = self._sizes.message_bytes // 4
        return torch.zeros(num_elements, dtype=torch.float32, device=self._device)

    def _seconds_per_call(self, work: Callable[[], object], group: Group = None) -> float:
        """Returns the median of rounds of calls.

        Ranks of a group do the same number of calls.
        """
        # The first call opens connections, chooses kernels or touches new memory.
        self._seconds(work, 1)
        once_s = self._seconds(work, 1)
        longest = torch.tensor([once_s], dtype=torch.float64, device=self._device)
        collectives.all_reduce(longest, group, dist.ReduceOp.MAX)
        calls_in_time = self._sizes.seconds / _ROUNDS / max(longest.item(), 1e-9)
        calls = max(1, min(_MAX_CALLS, int(calls_in_time)))
        rounds = []
        for _ in range(_ROUNDS):
            rounds.append(self._seconds(work, calls))
        return max(median(rounds) / calls, 1e-9)

    def _seconds(self, work: Callable[[], object], calls: int) -> float:
        device.synchronize(self._device)
        started = self._clock()
        for _ in range(calls):
            work()
        device.synchronize(self._device)
        return self._clock() - started


def _device_name(torch_device: torch.device) -> str:
    if torch_device.type == "cuda":
        return torch.cuda.get_device_name(torch_device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return "CPU"


def _problem(
    left: torch.Tensor, right: torch.Tensor, first: torch.Tensor, last: torch.Tensor
) -> str | None:
    """Returns what is wrong with two results of a product."""
    if not torch.equal(first, last):
        return "the same product had two different results"
    expected = left[:_CHECKED_ROWS].double() @ right.double()
    difference = (first[:_CHECKED_ROWS].double() - expected).abs().max()
    error = (difference / expected.abs().max()).item()
    if not error < _TOLERANCES[left.dtype]:
        return f"a product was wrong by {error:.1%} of its largest element"
    return None
