"""Measures how long a recovery took, by part.

Owns: the split into rebuilding, loading and recomputing. Pure: times come in as values.
Must not know: Ray.

The clock starts when the driver sees the failure; how long that took after the failure
itself only an outside observer can measure.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_LOADING = ("model", "load", "saver", "data")
"""Phases of a rank's start that count as loading; the rest is rebuilding."""


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
        """Takes a PhaseReport of rank 0 in the next attempt."""
        if data["phase"] in _LOADING:
            self._load_s += float(data["seconds"])

    def step(self, step: int, now: float) -> dict[str, Any] | None:
        """Takes a step of the next attempt.

        Returns the split once the step is the first that had not been done before.
        """
        # From here on, steps are repeated that were done since the checkpoint.
        if self._first_step_at is None:
            self._first_step_at = now
        if step <= self.reached:
            return None
        # The phases of a rank's start are measured in the rank; what is left of the time
        # until its first step went into processes, store and rendezvous.
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
