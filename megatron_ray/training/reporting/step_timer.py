"""Measures the wall time of a step and of its parts.

Owns: the loop's clock; it also adds this rank's own time to the process's record.
"""

import time
from dataclasses import dataclass

from megatron_ray.distributed.activity import PROCESS


@dataclass(frozen=True)
class StepTimes:
    """Seconds that a step took."""

    total_s: float
    parts_s: dict[str, float]
    """Seconds by the name of the part."""


class StepTimer:
    """Splits the time of consecutive steps into parts.

    On CUDA the parts are launch times, because the host does not wait for the device;
    the total is correct once the queue is full.
    """

    def __init__(self) -> None:
        now = time.perf_counter()
        self._step_start = now
        self._part_start = now
        self._parts_s: dict[str, float] = {}
        self._waited_s = PROCESS.waited_s

    def mark(self, part: str) -> None:
        """Ends a part of the step."""
        now = time.perf_counter()
        self._parts_s[part] = self._parts_s.get(part, 0.0) + now - self._part_start
        self._part_start = now

    def finish(self) -> StepTimes:
        """Ends the step and starts the next one; returns the times since the last end."""
        now = time.perf_counter()
        total_s = now - self._step_start
        times = StepTimes(total_s, self._parts_s)
        PROCESS.add_step(total_s, total_s - (PROCESS.waited_s - self._waited_s))
        self._start(now)
        return times

    def restart(self) -> None:
        """Starts the step now, excluding the time since the last one (evaluation)."""
        self._start(time.perf_counter())

    def _start(self, now: float) -> None:
        self._step_start = now
        self._part_start = now
        self._parts_s = {}
        self._waited_s = PROCESS.waited_s
