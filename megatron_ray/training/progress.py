"""Tracks the progress of a run.

Owns: the position of a run, and when periodic actions are due.
"""

from dataclasses import dataclass, replace

from megatron_ray.config.schedules.batch_sizes import BatchSizes


@dataclass(frozen=True)
class SkippedSteps:
    """The steps of a run that have left the model as it was."""

    total: int = 0
    """Steps that were skipped because their numbers were not finite, or by a rule."""
    consecutive: int = 0
    """Those among the last steps, without a good one in between."""
    left_out: int = 0
    """Steps in training.skip_steps, which are not counted in the others."""
    overflows: int = 0
    """Steps whose gradients overflowed with a loss scale that could be lowered, which are
    not counted in the others either."""

    def after_step(
        self, *, is_good: bool, is_left_out: bool, is_overflow: bool = False
    ) -> "SkippedSteps":
        """Returns the counts after one more step."""
        if is_left_out:
            return replace(self, left_out=self.left_out + 1)
        if is_overflow:
            return replace(self, overflows=self.overflows + 1)
        if is_good:
            return replace(self, consecutive=0)
        return replace(self, total=self.total + 1, consecutive=self.consecutive + 1)


@dataclass(frozen=True)
class Progress:
    """The progress of a run, from which the loop can continue."""

    step: int = 0
    """Steps taken, skipped ones included."""
    consumed_samples: int = 0
    """Number of training samples used by all ranks."""
    planned_samples: tuple[int, ...] = ()
    """Samples of the whole run for which their order was drawn; more than one number when
    the run was lengthened on a resume."""
    skipped: SkippedSteps = SkippedSteps()
    """Steps without an update, as far as their numbers have been read."""

    @property
    def num_updates(self) -> int:
        """Number of updates of the optimizer."""
        skipped = self.skipped
        return self.step - skipped.total - skipped.left_out - skipped.overflows

    def after_step(self, batch_sizes: BatchSizes) -> "Progress":
        """Returns the progress after one more step."""
        consumed = self.consumed_samples + batch_sizes.at(self.consumed_samples)
        return replace(self, step=self.step + 1, consumed_samples=consumed)

    def planned_for(
        self, steps: int, batch_sizes: BatchSizes, *, is_same_order: bool
    ) -> "Progress":
        """Returns the progress with samples planned up to step `steps`.

        Samples that were planned before keep their order, unless `is_same_order` is
        False: then nothing of it is left to keep.
        """
        # The batch grows with the samples that were consumed, whatever its size was then.
        rest = replace(batch_sizes, consumed=self.consumed_samples)
        needed = self.consumed_samples + rest.samples_after(max(0, steps - self.step))
        planned = self.planned_samples
        if not is_same_order:
            planned = ()
        if not planned or needed > planned[-1]:
            planned = (*planned, needed)
        return replace(self, planned_samples=planned)

    def with_skipped(self, skipped: SkippedSteps) -> "Progress":
        """Returns the progress with other counts of skipped steps."""
        return replace(self, skipped=skipped)


def is_due(every: int | None, progress: Progress) -> bool:
    """Returns whether an action with a period of `every` steps is due now.

    None means never.
    """
    return every is not None and progress.step % every == 0
