"""Counts how far a run has come.

Owns: the position of a run and what is due at it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """The progress of a run: all that the loop needs to go on from here."""

    step: int = 0
    """Optimizer steps taken."""
    consumed_samples: int = 0
    """Samples of the training data used, all ranks."""

    def after_step(self, num_samples: int) -> "Progress":
        """Returns the progress after one more step over so many samples."""
        return Progress(self.step + 1, self.consumed_samples + num_samples)


def is_due(every: int | None, progress: Progress) -> bool:
    """Returns whether something that happens every so many steps happens now.

    None means never.
    """
    return every is not None and progress.step % every == 0
