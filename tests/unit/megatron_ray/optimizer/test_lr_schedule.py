"""Learning rates by hand."""

from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ray.config.schedules.batch_sizes import BatchSizes
from megatron_ray.config.schedules.lengths import Clock, lengths_of
from megatron_ray.config.schedules.rates import ScheduleConfig
from megatron_ray.optimizer.lr_schedule import learning_rate

BATCH = 12
SEQ_LENGTH = 7


def rates(steps: int, at: list[int], **schedule: object) -> list[float]:
    config = ScheduleConfig.model_validate(schedule)
    lengths = lengths_of(config, Clock(BatchSizes(BATCH), SEQ_LENGTH, steps))
    return [learning_rate(step * BATCH, 1.0, config, lengths) for step in at]


def test_cosine_with_warmup() -> None:
    assert rates(
        110, [1, 5, 10, 60, 110, 200], warmup_steps=10, min_lr=0.2
    ) == pytest.approx([0.1, 0.5, 1.0, 0.6, 0.2, 0.2])


def test_linear() -> None:
    assert rates(100, [25, 50, 100], kind="linear", min_lr=0.5) == pytest.approx(
        [0.875, 0.75, 0.5]
    )


def test_constant_never_decays() -> None:
    assert rates(10, [1, 10, 1000], kind="constant") == [1.0, 1.0, 1.0]


def test_the_warmup_climbs_from_init_lr() -> None:
    assert rates(
        100, [1, 5, 10, 11], kind="constant", warmup_steps=10, init_lr=0.5
    ) == pytest.approx([0.55, 0.75, 1.0, 1.0])


def test_inverse_sqrt_falls_with_the_root_of_the_step() -> None:
    assert rates(
        1000, [4, 16, 64, 900, 1001], kind="inverse_sqrt", warmup_steps=4, min_lr=0.1
    ) == pytest.approx([1.0, 0.5, 0.25, 0.1, 0.1])
    assert rates(100, [1, 25], kind="inverse_sqrt") == pytest.approx([1.0, 0.2])


@pytest.mark.parametrize(
    ("shape", "half", "quarter"),
    [
        ("linear", 0.5, 0.75),
        ("cosine", 0.5, (1 + sqrt(0.5)) / 2),
        ("exponential", 2 * sqrt(0.5) - 1, 2 * 0.5**0.25 - 1),
        ("minus_sqrt", 1 - sqrt(0.5), 0.5),
    ],
)
def test_wsd_decays_at_the_end(shape: str, half: float, quarter: float) -> None:
    at = [10, 50, 80, 85, 90, 100, 101]
    fields = {"kind": "wsd", "warmup_steps": 10, "wsd_decay_steps": 20, "min_lr": 0.2}
    expected = [1.0, 1.0, 1.0, 0.2 + 0.8 * quarter, 0.2 + 0.8 * half, 0.2, 0.2]
    assert rates(100, at, **fields, wsd_shape=shape) == pytest.approx(expected)


def test_wsd_decays_over_a_tenth_by_default() -> None:
    at = [90, 95, 100]
    assert rates(100, at, kind="wsd", wsd_shape="linear") == pytest.approx([1.0, 0.5, 0.0])


@pytest.mark.parametrize("kind", ["linear", "cosine", "inverse_sqrt", "wsd"])
@given(
    steps=st.integers(2, 10_000),
    share=st.floats(0, 0.9),
    min_lr=st.floats(0, 1),
)
def test_the_rate_climbs_to_its_peak_and_never_rises_after(
    kind: str, steps: int, share: float, min_lr: float
) -> None:
    warmup = int(share * steps)
    at = sorted({1, warmup, warmup + 1, steps // 2 + 1, steps - 1, steps, steps + 1} - {0})
    lrs = rates(steps, at, kind=kind, warmup_steps=warmup, min_lr=min_lr)
    assert max(lrs) <= 1.0
    falling = [rate for step, rate in zip(at, lrs, strict=True) if step > warmup]
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] == pytest.approx(min_lr)


def test_decay_steps_end_the_decay_before_the_job() -> None:
    assert rates(100, [50, 51], kind="linear", decay_steps=50) == pytest.approx([0.0, 0.0])


def test_a_warmup_longer_than_the_job_is_legal() -> None:
    assert rates(10, [1, 10], warmup_steps=100) == pytest.approx([0.01, 0.1])
