"""Remainders are refused where there are no bf16 weights that they belong to."""

from typing import Any

import pytest

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.validation.check import find_problems
from megatron_ray.validation.parameters.main_parameters import remainder_problems


def config(precision: str, **parallel: Any) -> TrainConfig:
    return TrainConfig.from_mapping(
        {
            "model": {"preset": "gpt-tiny"},
            "parallel": {"dp": 2, **parallel},
            "data": {"train": [{"path": "x"}]},
            "training": {
                "seq_length": 8,
                "global_batch_size": 8,
                "steps": 100,
                "precision": precision,
            },
            "optimizer": {"lr": 0.1, "store_param_remainders": True},
        }
    )


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_other_precisions_are_refused(precision: str) -> None:
    settings = config(precision)
    (problem,) = remainder_problems(settings)
    assert (problem.pointer, problem.code) == (
        "/optimizer/store_param_remainders",
        "remainders_of_bf16",
    )
    assert problem.detail == (
        "a bf16 weight and its remainder are an fp32 number, and with "
        f"precision={precision} there are no bf16 weights; set precision to bf16, or leave "
        "store_param_remainders out"
    )
    assert problem in find_problems(settings)


def test_sharded_weights_are_refused() -> None:
    (problem,) = remainder_problems(config("bf16", zero=3))
    assert problem.detail == (
        "with zero=3 the sharded weights are fp32, so nothing is kept beside them; use "
        "zero=1, or leave store_param_remainders out"
    )


@pytest.mark.parametrize("zero", [0, 1])
def test_bf16_weights_have_remainders(zero: int) -> None:
    assert remainder_problems(config("bf16", zero=zero)) == []
