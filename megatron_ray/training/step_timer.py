"""Measures the wall time of a step and of its parts.

Owns: the loop's clock.
"""

import time
from dataclasses import dataclass


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

    def mark(self, part: str) -> None:
        """Ends a part of the step."""
        now = time.perf_counter()
        self._parts_s[part] = self._parts_s.get(part, 0.0) + now - self._part_start
        self._part_start = now

    def finish(self) -> StepTimes:
        """Ends the step and starts the next one; returns the times since the last end."""
        now = time.perf_counter()
        times = StepTimes(now - self._step_start, self._parts_s)
        self._start(now)
        return times

    def restart(self) -> None:
        """Starts the step now, excluding the time since the last one (evaluation)."""
        self._start(time.perf_counter())

    def _start(self, now: float) -> None:
        self._step_start = now
        self._part_start = now
        self._parts_s = {}
