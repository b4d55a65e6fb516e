"""Steps and ranks in training.profile."""

from typing import Any

import pytest
from pydantic import ValidationError

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.validation import check


def config(profile: dict[str, Any] | None, **training: Any) -> TrainConfig:
    fields = {"seq_length": 16, "global_batch_size": 2, "steps": 20, **training}
    return TrainConfig.from_mapping(
        {
            "model": {"preset": "gpt-tiny"},
            "parallel": {"dp": 2},
            "data": {"train": [{"path": "x"}]},
            "training": {**fields, "profile": profile},
            "optimizer": {"lr": 1e-3},
        }
    )


@pytest.mark.parametrize(
    ("steps", "expected"),
    [("10-12", (10, 12)), ("7", (7, 7)), (7, (7, 7)), ("1-20", (1, 20))],
)
def test_steps_are_a_range_or_one(steps: Any, expected: tuple[int, int]) -> None:
    profile = config({"steps": steps}).training.profile
    assert profile is not None
    assert profile.first_and_last == expected
    assert profile.ranks == (0,)


@pytest.mark.parametrize("steps", ["0-3", "12-10", "1-21", "soon", "1-", "-3", True, 1.5])
def test_other_steps_are_refused(steps: Any) -> None:
    with pytest.raises(ValidationError) as refused:
        config({"steps": steps}, steps=500)
    (error,) = refused.value.errors()
    assert error["loc"] == ("training", "profile", "steps")


def test_steps_behind_the_last_one_are_a_problem() -> None:
    assert check.find_problems(config({"steps": "18-20"})) == []
    (problem,) = check.find_problems(config({"steps": "18-21"}))
    assert problem.pointer == "/training/profile/steps"
    assert problem.detail == (
        "steps=18-21 end after the run's last step, 20; profile earlier ones"
    )
    # Their number is not known before the data are prepared.
    assert check.find_problems(config({"steps": "18-21"}, steps=None, epochs=1.0)) == []


def test_ranks_that_the_run_does_not_have_are_a_warning() -> None:
    assert check.find_warnings(config({"steps": "2", "ranks": [0, 1]})) == []
    (warning,) = check.find_warnings(config({"steps": "2", "ranks": [1, 2]}))
    assert warning.pointer == "/training/profile/ranks"
    assert warning.detail.startswith("there is no rank 2: the run has 2 ranks")
