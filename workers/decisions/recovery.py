"""How long it took until new work was done again after a failure, by part.

Pure: times come in as values. Must not know: Ray.

The clock starts when the driver sees the failure; how long that took after the failure
itself only an outsider can tell.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_LOADING = ("model", "load", "saver", "data")


@dataclass
class RecoveryWatch:
    """One failure; `noticed_at` and the times given later are seconds of one monotonic
    clock.
    """

    noticed_at: float
    reached: int
    """Highest step of the job before the failure."""
    from_step: int = 0
    """Step of the checkpoint that the next attempt starts from."""
    _phases: dict[str, float] = field(default_factory=dict)
    _first_step_at: float | None = None

    def phase(self, data: Mapping[str, Any]) -> None:
        """A PhaseReport of rank 0 in the next attempt."""
        name = str(data["phase"])
        self._phases[name] = self._phases.get(name, 0.0) + float(data["seconds"])

    def step(self, step: int, now: float) -> dict[str, Any] | None:
        """A step of the next attempt; the split once it is the first that had not been
        done before.
        """
        if self._first_step_at is None:
            self._first_step_at = now
        if step <= self.reached:
            return None
        load = sum(seconds for name, seconds in self._phases.items() if name in _LOADING)
        return {
            "seconds": round(now - self.noticed_at, 3),
            "rebuild_s": round(max(0.0, self._first_step_at - self.noticed_at - load), 3),
            "load_s": round(load, 3),
            "recompute_s": round(now - self._first_step_at, 3),
            "from_step": self.from_step,
            "step": step,
        }


def in_words(split: Mapping[str, Any], attempt: int) -> str:
    """The split as a line of the history."""
    text = (
        f"steps go on at {split['step']} (attempt {attempt}), {split['seconds']:.1f} s after "
        "the failure was noticed:"
    )
    return (
        f"{text} rebuild {split['rebuild_s']:.1f} s, load {split['load_s']:.1f} s, recompute "
        f"{split['recompute_s']:.1f} s"
    )
