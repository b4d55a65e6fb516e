"""Tracks the progress of a run.

Owns: the position of a run, and when periodic actions are due.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """The progress of a run, from which the loop can continue."""

    step: int = 0
    """Optimizer steps taken."""
    consumed_samples: int = 0
    """Number of training samples used by all ranks."""

    def after_step(self, num_samples: int) -> "Progress":
        """Returns the progress after one more step of `num_samples` samples."""
        return Progress(self.step + 1, self.consumed_samples + num_samples)


def is_due(every: int | None, progress: Progress) -> bool:
    """Returns whether an action with a period of `every` steps is due now.

    None means never.
    """
    return every is not None and progress.step % every == 0
