"""Batch-size ramp-up against Megatron's calculator, written out."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from megatron_ray.config.schedules.batch_sizes import BatchSizes, RampupConfig
from megatron_ray.config.training import TrainingConfig


def megatron(start: int, increment: int, samples: int, full: int, consumed: int) -> int:
    """The batch size that Megatron's calculator returns."""
    if consumed > samples:
        return full
    samples_per_increment = samples / ((full - start) // increment)
    return start + int(consumed / samples_per_increment) * increment


def table(start: int, increment: int, samples: int, full: int, steps: int) -> list[int]:
    """The consumed samples after each of the first steps, from 0 steps on."""
    consumed = [0]
    for _ in range(steps):
        consumed.append(
            consumed[-1] + megatron(start, increment, samples, full, consumed[-1])
        )
    return consumed


@pytest.mark.parametrize(
    ("start", "increment", "samples", "full"),
    [
        (4, 4, 100, 16),
        (16, 16, 30_000, 256),
        (32, 32, 65_536, 1024),
        (8, 24, 999, 200),
        (1, 1, 7, 64),
        (192, 192, 1, 384),
    ],
)
def test_a_thousand_steps_equal_megatrons(
    start: int, increment: int, samples: int, full: int
) -> None:
    rampup = RampupConfig(start=start, increment=increment, samples=samples)
    sizes = BatchSizes(full, rampup)
    consumed = table(start, increment, samples, full, 1000)
    assert [sizes.samples_after(step) for step in range(1001)] == consumed
    for before, after in pairwise(consumed):
        assert sizes.at(before) == after - before
    # From any of its steps on it goes on in the same way, as a resumed run does.
    for step in (3, 500):
        rest = BatchSizes(full, rampup, consumed[step])
        samples_left = [rest.samples_after(n) for n in range(400)]
        assert samples_left == [n - consumed[step] for n in consumed[step : step + 400]]


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(0, 12),
    st.integers(1, 4000),
    st.integers(0, 5000),
)
def test_steps_and_samples_are_inverse(
    start: int, increment: int, num: int, samples: int, target: int
) -> None:
    rampup = RampupConfig(start=start, increment=increment, samples=samples)
    sizes = BatchSizes(start + num * increment, rampup)
    within = sizes.steps_within(target)
    assert sizes.samples_after(within) <= target < sizes.samples_after(within + 1)
    until = sizes.steps_until(target)
    assert sizes.samples_after(until) >= target
    assert until == 0 or sizes.samples_after(until - 1) < target
    for step in range(20):
        assert sizes.at(sizes.samples_after(step)) % sizes.divisor == 0


def training(**fields: Any) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {"seq_length": 10, "global_batch_size": 16, **fields}
    )


def test_lengths_count_the_smaller_batches() -> None:
    rampup = {"start": 4, "increment": 4, "samples": 36}
    # 4, 4, 4, 8, 8, 12, 16, 16, ... samples: 12 at each of the three smaller sizes.
    assert training(steps=9, rampup_batch_size=rampup).batch_sizes.samples_after(7) == 56
    assert training(tokens=560, rampup_batch_size=rampup).num_steps == 7
    assert training(tokens=561, rampup_batch_size=rampup).num_steps == 8
    # 56 samples of 10 tokens, and the label of the last.
    assert training(epochs=1, rampup_batch_size=rampup).steps_over(561) == 7
    assert training(epochs=2, rampup_batch_size=rampup).steps_over(281) == 7
    assert training(epochs=1, rampup_batch_size=rampup).steps_over(560) == 6
    assert training(epochs=1, rampup_batch_size=rampup).steps_over(12) == 1
    assert training(tokens=561).num_steps == 4


def test_too_many_sizes_are_refused_when_read() -> None:
    rampup = {"start": 1, "increment": 1, "samples": 10}
    with pytest.raises(ValidationError, match="grows 16777215 times, at most 1024 times"):
        training(global_batch_size=1 << 24, steps=1, rampup_batch_size=rampup)
