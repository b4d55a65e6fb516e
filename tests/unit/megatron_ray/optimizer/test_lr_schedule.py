"""Learning rates by hand."""

import pytest

from megatron_ray.config.optimizer import OptimizerConfig, ScheduleConfig
from megatron_ray.optimizer.lr_schedule import learning_rate


def rates(steps: int, at: list[int], **schedule: object) -> list[float]:
    config = ScheduleConfig.model_validate(schedule)
    return [learning_rate(step, OptimizerConfig(lr=1.0), config, steps) for step in at]


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


def test_decay_steps_end_the_decay_before_the_job() -> None:
    assert rates(100, [50, 51], kind="linear", decay_steps=50) == pytest.approx([0.0, 0.0])


def test_a_warmup_longer_than_the_job_is_legal() -> None:
    assert rates(10, [1, 10], warmup_steps=100) == pytest.approx([0.01, 0.1])
