"""Measures which share of the time with resources a job makes progress.

Owns: the definition of goodput. Pure: every method gets the time. Must not know: Ray,
how steps are reported.

Not productive are the start of ranks, recoveries, checkpoints that block the loop, and
steps that are repeated after a failure.
"""

from dataclasses import dataclass


@dataclass
class Goodput:
    """The times of a job since its driver has been started."""

    _held_since: float | None = None
    _held_s: float = 0.0
    _productive_s: float = 0.0
    _highest_step: int = 0

    def held(self, now: float) -> None:
        """The job has resources from now on; repeating it changes nothing."""
        if self._held_since is None:
            self._held_since = now

    def released(self, now: float) -> None:
        """The job has no resources from now on."""
        self._held_s = self._total_s(now)
        self._held_since = None

    def step(self, step: int, step_s: float) -> None:
        """A step has taken `step_s` seconds; one that was made before does not count."""
        if step > self._highest_step:
            self._highest_step = step
            self._productive_s += step_s

    def ratio(self, now: float) -> float | None:
        """Returns the goodput, from 0 to 1; None before there were any resources."""
        total_s = self._total_s(now)
        if total_s <= 0:
            return None
        # An adopted rank also reports steps from before this driver.
        return min(1.0, self._productive_s / total_s)

    def _total_s(self, now: float) -> float:
        if self._held_since is None:
            return self._held_s
        return self._held_s + now - self._held_since
