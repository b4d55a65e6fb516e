"""Moments in bf16 that would hardly change are refused."""

from typing import Any

import pytest

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.validation.parameters.moments import moment_problems

SHORT = {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}


def config(**optimizer: Any) -> TrainConfig:
    return TrainConfig.from_mapping(
        {
            "model": {"preset": "gpt-tiny"},
            "data": {"train": [{"path": "x"}]},
            "training": {"seq_length": 8, "global_batch_size": 8, "steps": 100},
            "optimizer": {"lr": 0.1, **optimizer},
        }
    )


@pytest.mark.parametrize(
    ("optimizer", "pointer", "detail"),
    [
        (
            SHORT | {"beta2": 0.999},
            "/optimizer/beta2",
            "beta2=0.999 changes a moment by 0.001 of itself in a step, which bf16 rounds "
            "away; make it at most 0.99, or leave exp_avg_sq_dtype out",
        ),
        (
            SHORT | {"beta1": 0.995},
            "/optimizer/beta1",
            "beta1=0.995 changes a moment by 0.005 of itself in a step, which bf16 rounds "
            "away; make it at most 0.99, or leave exp_avg_dtype out",
        ),
        (
            SHORT | {"groups": [{"parameters": ["embedding.*"], "beta2": 0.9999}]},
            "/optimizer/groups/0/beta2",
            "beta2=0.9999 changes a moment by 0.0001 of itself",
        ),
        (
            SHORT | {"switches": [{"step": 9, "beta2": 0.9999}]},
            "/optimizer/switches/0/beta2",
            "beta2=0.9999 changes a moment by 0.0001 of itself",
        ),
        (
            {"name": "sgd", "momentum": 0.999, "exp_avg_dtype": "bf16"},
            "/optimizer/momentum",
            "momentum=0.999 changes a moment by 0.001 of itself",
        ),
        (
            {
                "name": "aggmo_adamw",
                "aggregated": [{"beta": 0.999, "weight": 0.5}],
                "exp_avg_dtype": "bf16",
            },
            "/optimizer/aggregated/0/beta",
            "beta=0.999 changes a moment by 0.001 of itself",
        ),
    ],
)
def test_slow_moments_are_refused(
    optimizer: dict[str, Any], pointer: str, detail: str
) -> None:
    (problem,) = moment_problems(config(**optimizer))
    assert problem.pointer == pointer
    assert detail in problem.detail


@pytest.mark.parametrize(
    "optimizer", [SHORT, {"beta2": 0.999}, {"beta2": 0.999, "exp_avg_dtype": "bf16"}]
)
def test_others_are_not(optimizer: dict[str, Any]) -> None:
    assert moment_problems(config(**optimizer)) == []
