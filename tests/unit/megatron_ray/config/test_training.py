"""The length of a run: steps, epochs or tokens."""

from typing import Any

import pytest
from pydantic import ValidationError

from megatron_ray.config.train_config import TrainConfig, apply_overrides
from megatron_ray.config.training import TrainingConfig
from megatron_ray.validation import check, resolution

BATCH = {"seq_length": 10, "global_batch_size": 4}


def training(**length: Any) -> TrainingConfig:
    return TrainingConfig.model_validate(BATCH | length)


def config(**length: Any) -> TrainConfig:
    return TrainConfig.from_mapping(
        {
            "model": {"preset": "gpt-tiny"},
            "data": {"train": [{"path": "x"}]},
            "training": BATCH | length,
            "optimizer": {"lr": 0.1},
        }
    )


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        ({"steps": 7}, 7),
        ({"tokens": 1}, 1),
        ({"tokens": 40}, 1),
        ({"tokens": 41}, 2),
        # 1001 tokens are 100 samples, since a label is taken from the next.
        ({"epochs": 1}, 25),
        ({"epochs": 2}, 50),
        ({"epochs": 0.5}, 12),
        ({"epochs": 0.001}, 1),
    ],
)
def test_every_length_is_a_number_of_steps(length: dict[str, Any], steps: int) -> None:
    assert training(**length).steps_over(1001) == steps
    resolved = resolution.with_length(config(**length), 1001)
    assert resolved.training.num_steps == steps
    again = TrainConfig.from_mapping(resolved.model_dump())
    assert again.training.steps == steps
    assert (again.training.epochs, again.training.tokens) == (None, None)


def test_tokens_are_resolved_with_the_layout_and_epochs_are_not() -> None:
    assert resolution.resolve(config(tokens=100), 1).training.steps == 3
    unresolved = resolution.resolve(config(epochs=3), 1).training
    assert (unresolved.steps, unresolved.epochs) == (None, 3)
    assert unresolved.known_steps is None
    with pytest.raises(ValueError, match="not resolved"):
        _ = unresolved.num_steps


@pytest.mark.parametrize(
    ("length", "message"),
    [
        ({}, "whole number, got null; or give training.epochs or training.tokens"),
        ({"steps": None, "epochs": None}, "whole number, got null"),
        ({"steps": 1, "epochs": 1}, "only one of training.steps"),
        ({"epochs": 1, "tokens": 1}, "only one of training.steps"),
        ({"steps": 1, "epochs": 1, "tokens": 1}, "leave the others out"),
    ],
)
def test_exactly_one_length_is_given(length: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message) as caught:
        training(**length)
    assert [error["loc"] for error in caught.value.errors()] == [("steps",)]


@pytest.mark.parametrize("length", [{"epochs": 0}, {"epochs": -1}, {"tokens": 0}])
def test_a_length_that_is_wrong_itself_is_one_problem(length: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        training(**length)
    assert [error["loc"] for error in caught.value.errors()] == [tuple(length)]


def test_an_override_of_one_length_replaces_another() -> None:
    values = {"training": {"steps": 5, "seq_length": 8}}
    assert apply_overrides(values, ["training.epochs=2"]) == {
        "training": {"seq_length": 8, "epochs": 2}
    }
    assert apply_overrides(values, ["training.seq_length=9"])["training"]["steps"] == 5
    both = apply_overrides(values, ["training.epochs=2", "training.steps=3"])
    assert both["training"] == {"seq_length": 8, "epochs": 2, "steps": 3}


def test_too_many_samples_name_the_length_that_was_given() -> None:
    for length in ({"steps": 1 << 30}, {"tokens": 1 << 40}):
        (problem,) = check.find_problems(config(**length))
        (field,) = length
        assert problem.pointer == f"/training/{field}"
        assert f"lower {field}" in problem.detail
    assert not check.find_problems(config(epochs=1 << 20))
