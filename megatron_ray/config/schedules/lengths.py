"""Turns the lengths of a schedule into samples, whatever their unit.

Owns: that conversion; rates and rules count samples only. Pure.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from megatron_ray.config.schedules.batch_sizes import BatchSizes
from megatron_ray.config.schedules.rates import ScheduleConfig


@dataclass(frozen=True)
class Clock:
    """Counts the samples of a schedule's steps, from the step with which it begins.

    As if the whole run had the batch sizes of its spec, also when another batch size was
    set on a resume.
    """

    sizes: BatchSizes
    seq_length: int
    last_step: int
    """The run's last step, in which parts without an end of their own end."""
    steps_before: int = 0
    """Steps of the run before the schedule."""

    @property
    def num_samples(self) -> int:
        """Samples from the schedule's first step to the run's last."""
        return self.samples(self.last_step - self.steps_before)

    def samples(self, steps: int) -> int:
        """Returns the samples of the schedule's first `steps` steps."""
        return self.sizes.samples_after(self.steps_before + steps) - self._samples_before

    def steps_until(self, samples: int) -> int:
        """Returns the fewest steps with at least so many samples."""
        return self.sizes.steps_until(self._samples_before + samples) - self.steps_before

    def steps_within(self, samples: int) -> int:
        """Returns the most steps with at most so many samples."""
        return self.sizes.steps_within(self._samples_before + samples) - self.steps_before

    @property
    def _samples_before(self) -> int:
        return self.sizes.samples_after(self.steps_before)


@dataclass(frozen=True)
class Lengths:
    """The lengths of a schedule's parts, in samples from its first step on."""

    first_step: int
    """Samples of its first step."""
    warmup: int
    decay_end: int
    """Samples after which the decay ends, with those of the warm-up."""
    wsd_decay: int


def lengths_of(schedule: ScheduleConfig, clock: Clock) -> Lengths:
    """Returns the lengths of a schedule.

    Of a part that is given in several units the first one counts.
    """
    warmup = _length(schedule, "warmup", clock, clock.samples) or 0
    decay_end = _length(schedule, "decay", clock, clock.samples)
    if decay_end is None:
        decay_end = clock.num_samples
    last = clock.steps_until(decay_end)

    def samples_of_last(steps: int) -> int:
        """Returns the samples of the last steps of the decay."""
        return decay_end - clock.samples(max(0, last - steps))

    wsd_decay = _length(schedule, "wsd_decay", clock, samples_of_last)
    if wsd_decay is None:
        wsd_decay = samples_of_last(ceil(last / 10))
    return Lengths(clock.samples(1), warmup, decay_end, wsd_decay)


def _length(
    schedule: ScheduleConfig, part: str, clock: Clock, samples: Callable[[int], int]
) -> int | None:
    """Returns the length of a part; `samples` converts steps. None without one."""
    fields = schedule.length_fields(part)
    if not fields:
        return None
    value = getattr(schedule, fields[0])
    match fields[0].removeprefix(f"{part}_"):
        case "steps":
            return samples(value)
        case "tokens":
            # Ceiling division.
            return -(-int(value) // clock.seq_length)
        case "fraction":
            return max(1, round(float(value) * clock.num_samples))
    return int(value)
