"""Numbers of a schedule that contradict each other, or have no effect."""

from typing import Any

import pytest

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.validation.schedule import schedule_problems, schedule_warnings


def config(**schedule: Any) -> TrainConfig:
    return TrainConfig.from_mapping(
        {
            "model": {"preset": "gpt-tiny"},
            "data": {"train": [{"path": "x"}]},
            "training": {"seq_length": 8, "global_batch_size": 8, "steps": 100},
            "optimizer": {"lr": 0.1},
            "schedule": {"min_lr": 0.01, **schedule},
        }
    )


@pytest.mark.parametrize(
    ("schedule", "pointer", "words"),
    [
        ({"init_lr": 0.2}, "/schedule/init_lr", "init_lr=0.2 is above optimizer.lr=0.1"),
        (
            {"kind": "wsd", "warmup_steps": 10, "wsd_decay_steps": 91},
            "/schedule/wsd_decay_steps",
            "wsd_decay_steps=91 is more than the 90 steps between warmup_steps=10 and the end "
            "of the decay in step 100; make it at most 90",
        ),
        (
            {"kind": "wsd", "warmup_steps": 95},
            "/schedule/wsd_decay_steps",
            "wsd_decay_steps=10 is more than the 5 steps between",
        ),
        (
            {"kind": "wsd", "min_lr": 0, "decay_steps": 50},
            "/schedule/decay_steps",
            "leaves a rate of 0 for 51 of training.steps=100",
        ),
        (
            {"kind": "inverse_sqrt", "min_lr": 0, "decay_steps": 50},
            "/schedule/decay_steps",
            "leaves a rate of 0 for 50 of training.steps=100",
        ),
    ],
)
def test_contradictions_are_refused(
    schedule: dict[str, Any], pointer: str, words: str
) -> None:
    (problem,) = schedule_problems(config(**schedule))
    assert problem.pointer == pointer
    assert words in problem.detail


@pytest.mark.parametrize(
    "schedule",
    [
        {"kind": "wsd", "warmup_steps": 10, "wsd_decay_steps": 90},
        {"kind": "inverse_sqrt", "min_lr": 0, "warmup_steps": 10},
        {"warmup_steps": 5, "init_lr": 0.1},
    ],
)
def test_what_can_run_is_not_refused(schedule: dict[str, Any]) -> None:
    assert schedule_problems(config(**schedule)) == []


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ({"init_lr": 0.01}, "init_lr=0.01 has no effect without warmup_steps"),
        ({"wsd_decay_steps": 9}, "wsd_decay_steps=9 has no effect with kind=cosine"),
        (
            {"kind": "constant", "min_lr": 0, "wsd_shape": "cosine"},
            "wsd_shape=cosine has no effect with kind=constant",
        ),
    ],
)
def test_what_has_no_effect_is_noted(schedule: dict[str, Any], words: str) -> None:
    assert words in [warning.detail for warning in schedule_warnings(config(**schedule))]
