"""Computes how many samples each step has, and counts samples and steps by it.

Owns: batch-size ramp-up, by Megatron's rule. Pure. Must not know: how samples are spread
over ranks.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import gcd
from typing import Any

from pydantic import Field

from megatron_ray.config.base import Config

MAX_INCREMENTS = 1024
"""Largest number of batch sizes before the full one."""


class RampupConfig(Config):
    """Smaller batches in the first steps.

    A run begins with `start` samples per step and adds `increment` at equal distances,
    counted in samples, until it has global_batch_size after `samples` samples.
    """

    start: int = Field(ge=1, le=1 << 24)
    """Samples of the first step; a multiple of micro_batch_size x dp."""
    increment: int = Field(ge=1, le=1 << 24)
    """Samples by which a step grows; a multiple of micro_batch_size x dp that divides
    global_batch_size - start."""
    samples: int = Field(ge=1, le=1 << 48)
    """Samples over which the batch grows. Each batch size lasts for an equal part of
    them, rounded up to whole steps."""

    def num_increments(self, full: int) -> int:
        """Returns how often a step grows up to `full` samples."""
        return max(0, full - self.start) // self.increment


@dataclass(frozen=True)
class _Period:
    """Consecutive steps with equally many samples each."""

    steps: int
    """Steps before it."""
    samples: int
    """Samples before it."""
    size: int


@dataclass(frozen=True)
class BatchSizes:
    """The number of samples of each step, a function of those that are consumed.

    Steps are counted from the `consumed` samples that a run has used before.
    """

    full: int
    rampup: RampupConfig | None = None
    consumed: int = 0
    _periods: tuple[_Period, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_periods", tuple(self._iterate()))

    def __str__(self) -> str:
        if len(self.sizes) == 1:
            return str(self.full)
        return f"{self.sizes[0]} to {self.full}"

    def _iterate(self) -> Iterator[_Period]:
        steps = 0
        samples = 0
        size = self.at(self.consumed)
        while size < self.full:
            yield _Period(steps, samples, size)
            num_steps = self._steps_of_size(self.consumed + samples)
            steps += num_steps
            samples += num_steps * size
            size = self.at(self.consumed + samples)
        yield _Period(steps, samples, self.full)

    def at(self, consumed: int) -> int:
        """Returns the samples of the step after `consumed` samples of the whole run."""
        rampup = self.rampup
        if rampup is None or consumed >= rampup.samples:
            return self.full
        level = self._level(rampup, consumed)
        if level == rampup.num_increments(self.full):
            return self.full
        return rampup.start + level * rampup.increment

    def _level(self, rampup: RampupConfig, consumed: int) -> int:
        return consumed * rampup.num_increments(self.full) // rampup.samples

    def _steps_of_size(self, consumed: int) -> int:
        """Returns how many steps after `consumed` samples have the same size."""
        rampup = self.rampup
        assert rampup is not None
        level = self._level(rampup, consumed)
        # The first number of consumed samples at the next level; ceiling divisions.
        end = -(-(level + 1) * rampup.samples // rampup.num_increments(self.full))
        return -(-(end - consumed) // self.at(consumed))

    @property
    def sizes(self) -> tuple[int, ...]:
        """All batch sizes, smallest first."""
        return tuple(period.size for period in self._periods)

    @property
    def divisor(self) -> int:
        """The largest number that divides the samples of every step."""
        if self.rampup is None or len(self.sizes) == 1:
            return self.full
        return gcd(self.full, self.rampup.start, self.rampup.increment)

    def samples_after(self, steps: int) -> int:
        """Returns the samples of the first `steps` steps."""
        period = self._periods[0]
        for later in self._periods:
            if later.steps > steps:
                break
            period = later
        return period.samples + (steps - period.steps) * period.size

    def steps_until(self, samples: int) -> int:
        """Returns the fewest steps with at least so many samples."""
        period = self._periods[0]
        for later in self._periods:
            if later.samples >= samples:
                break
            period = later
        return period.steps + -(-(samples - period.samples) // period.size)

    def steps_within(self, samples: int) -> int:
        """Returns the most steps with at most so many samples."""
        period = self._periods[0]
        for later in self._periods:
            if later.samples > samples:
                break
            period = later
        return period.steps + (samples - period.samples) // period.size


def batch_sizes_of(training: Mapping[str, Any]) -> BatchSizes | None:
    """Returns the batch sizes of `training` as JSON, of any version of a spec.

    None when it has no batch size.
    """
    full = training.get("global_batch_size")
    if not isinstance(full, int):
        return None
    rampup = training.get("rampup_batch_size")
    if not isinstance(rampup, Mapping) or not RampupConfig.model_fields.keys() <= {*rampup}:
        return BatchSizes(full)
    # Later versions may have more fields.
    sizes = {name: rampup[name] for name in RampupConfig.model_fields}
    return BatchSizes(full, RampupConfig.model_validate(sizes))
