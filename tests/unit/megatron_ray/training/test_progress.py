"""How many samples a run has used and will use."""

from megatron_ray.config.schedules.batch_sizes import BatchSizes, RampupConfig
from megatron_ray.training.progress import Progress

GROWING = BatchSizes(16, RampupConfig(start=4, increment=4, samples=36))
"""4, 4, 4, 8, 8, 12, 16, 16, ... samples."""


def test_steps_use_the_samples_of_their_batch() -> None:
    progress = Progress()
    consumed = []
    for _ in range(8):
        progress = progress.after_step(GROWING)
        consumed.append(progress.consumed_samples)
    assert consumed == [4, 8, 12, 20, 28, 40, 56, 72]
    assert Progress(3, 24).after_step(BatchSizes(8)) == Progress(4, 32)


def test_samples_are_planned_for_the_batches_that_follow() -> None:
    whole = Progress().planned_for(8, GROWING, is_same_order=True)
    assert whole.planned_samples == (72,)
    resumed = Progress(4, 20, (72,)).planned_for(8, GROWING, is_same_order=True)
    assert resumed.planned_samples == (72,)
    longer = Progress(4, 20, (72,)).planned_for(9, GROWING, is_same_order=True)
    assert longer.planned_samples == (72, 88)
    # With another batch before: 20 of 36 samples are used, whatever their steps were.
    other = Progress(1, 20, (72,)).planned_for(5, GROWING, is_same_order=False)
    assert other.planned_samples == (20 + 8 + 12 + 16 + 16,)
