"""Measures this rank's device and links before its attempt trains.

Owns: the order of the measurements and their process groups. Must not know: Ray, what
counts as slow, what follows.

Each part is reported when it ends, so that a driver sees which one does not.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from megatron_ray.commands import Command
from megatron_ray.distributed.collectives import Group
from megatron_ray.distributed.speed import SpeedTest
from megatron_ray.reports import Report, SpeedReport
from workers.decisions.preflight.orders import PreflightOrder

_STOP_CHECK_S = 0.1


class Preflight:
    """The measurements of one rank, whose default process group is initialized.

    `report` receives each part as it ends.
    """

    def __init__(
        self, order: PreflightOrder, test: SpeedTest, report: Callable[[Report], None]
    ) -> None:
        self._order = order
        self._test = test
        self._report = report

    def run(self) -> bool:
        """Measures all parts; returns False after a connection that does not work."""
        products = self._test.products()
        self._report(
            SpeedReport(
                "device",
                device=self._test.device_name,
                flops=products.flops,
                bytes_per_s=self._test.memory(),
                problem=products.problem,
            )
        )
        for part, peer in self._order.parts[1:]:
            try:
                rate = self._measure_link(part, peer)
            except RuntimeError as error:
                line, *_ = str(error).splitlines() or [type(error).__name__]
                self._report(SpeedReport(part, peer=peer, problem=line))
                return False
            self._report(SpeedReport(part, peer=peer, bytes_per_s=rate))
        return True

    def _measure_link(self, part: str, peer: int | None) -> float:
        """Returns a bandwidth in bytes per second. Raises RuntimeError."""
        if part == "world":
            return self._test.all_reduce(dist.group.WORLD)
        if part == "node":
            with self._group(self._order.node_ranks) as group:
                return self._test.all_reduce(group)
        assert peer is not None
        with self._group(sorted((dist.get_rank(), peer))) as group:
            return self._test.exchange(group)

    @contextmanager
    def _group(self, ranks: Sequence[int]) -> Iterator[Group]:
        # Longer than the driver waits, so that the driver and not NCCL ends the ranks.
        timeout = timedelta(seconds=2 * self._order.timeout_s)
        group = dist.new_group(list(ranks), timeout=timeout, use_local_synchronization=True)
        yield group
        # Not after an error: its connections may wait for a rank that does not answer.
        dist.destroy_process_group(group)


def await_stop(poll: Callable[[], Command]) -> None:
    """Waits until the driver, which has the reports, ends the attempt."""
    while poll() < Command.STOP:
        time.sleep(_STOP_CHECK_S)
