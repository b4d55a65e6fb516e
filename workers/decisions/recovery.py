"""Measures how long a recovery took, by part.

Owns: the split into rebuilding, loading and recomputing. Pure: times come in as values.
Must not know: Ray.

The clock starts when the driver detects the failure. The time from the failure to its
detection is not measured here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_LOADING = ("copies", "model", "load", "saver", "data")
"""Phases of a rank's start that count as loading; all others count as rebuilding."""


@dataclass
class RecoveryWatch:
    """The recovery from one failure.

    `noticed_at` and the times given later are seconds of one monotonic clock.
    """

    noticed_at: float
    reached: int
    """Highest step of the job before the failure."""
    from_step: int = 0
    """Step of the checkpoint that the next attempt starts from."""
    _load_s: float = 0.0
    _first_step_at: float | None = field(default=None)

    def phase(self, data: Mapping[str, Any]) -> None:
        """Processes a PhaseReport of rank 0 in the next attempt."""
        if data["phase"] in _LOADING:
            self._load_s += float(data["seconds"])

    def step(self, step: int, now: float) -> dict[str, Any] | None:
        """Processes a step of the next attempt.

        Returns the split once the step is the first that had not been done before.
        """
        # From here on, the steps since the checkpoint are repeated.
        if self._first_step_at is None:
            self._first_step_at = now
        if step <= self.reached:
            return None
        # The rank measures the phases of its start. The rest of the time until its
        # first step was spent on processes, store and rendezvous.
        until_first_step = self._first_step_at - self.noticed_at
        return {
            "seconds": round(now - self.noticed_at, 3),
            "rebuild_s": round(max(0.0, until_first_step - self._load_s), 3),
            "load_s": round(self._load_s, 3),
            "recompute_s": round(now - self._first_step_at, 3),
            "from_step": self.from_step,
            "step": step,
        }


def describe(split: Mapping[str, Any], attempt: int) -> str:
    """Returns the split as a line of the history."""
    return (
        f"recovered at step {split['step']} in {split['seconds']:.1f} s (attempt {attempt}): "
        f"rebuild {split['rebuild_s']:.1f} s, load {split['load_s']:.1f} s, recompute "
        f"{split['recompute_s']:.1f} s"
    )
