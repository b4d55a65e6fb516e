"""The factors of muP and CompleteP on each kind of parameter, by the papers' tables."""

from math import sqrt
from typing import Any

import pytest

from megatron_ray.config.model import ModelConfig
from megatron_ray.config.optimizer import OptimizerConfig
from megatron_ray.optimizer.update_rule import UpdateRules
from megatron_ray.sharding.parameter_types import LogicalParameter, RateFactors
from megatron_ray.sharding.parameters import logical_parameters

N = 4
"""Width as a multiple of the base model's."""
L = 3
"""Depth as a multiple of the base model's."""


def make_model(**mup: Any) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            "num_layers": 6,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "vocab_size": 128,
            "linear_bias": True,
            "position_embedding": "learned",
            "mup": mup or None,
        }
    )


def by_name(model: ModelConfig) -> dict[str, LogicalParameter]:
    return {parameter.name: parameter for parameter in logical_parameters(model)}


@pytest.mark.parametrize(
    ("mup", "matrix", "vector", "others"),
    [
        (
            {"base_hidden_size": 16},
            RateFactors(1 / N, 1 / N, N),
            RateFactors(1, 1 / N),
            RateFactors(1, 1 / N),
        ),
        (
            {"base_hidden_size": 16, "base_num_layers": 2},
            RateFactors(1 / N, 1 / (N * L), N),
            RateFactors(1, 1 / (N * L)),
            RateFactors(1, 1 / N),
        ),
        (
            {"base_hidden_size": 16, "base_num_layers": 2, "depth_alpha": 0.5},
            RateFactors(L**-0.5 / N, L**-0.5 / N, N),
            RateFactors(L**-0.5, L**-0.5 / N),
            RateFactors(1, 1 / N),
        ),
        ({}, RateFactors(), RateFactors(), RateFactors()),
    ],
)
def test_matrices_of_blocks_vectors_of_blocks_and_the_others_have_their_factors(
    mup: dict[str, Any], matrix: RateFactors, vector: RateFactors, others: RateFactors
) -> None:
    parameters = by_name(make_model(**mup))
    assert parameters["layers.5.attention.q.weight"].rates == matrix
    assert parameters["layers.0.mlp.down.weight"].rates == matrix
    assert parameters["layers.0.mlp.down.bias"].rates == vector
    assert parameters["layers.0.mlp_norm.weight"].rates == vector
    for name in ("embedding.weight", "position_embedding.weight", "head.weight"):
        assert parameters[name].rates == others
    assert parameters["final_norm.weight"].rates == others


def test_matrices_of_blocks_start_smaller_by_the_root_of_the_width() -> None:
    plain = by_name(make_model())
    wide = by_name(make_model(base_hidden_size=16))
    both = by_name(make_model(base_hidden_size=16, base_num_layers=2))
    for name, parameter in plain.items():
        factor = 1.0
        if name.startswith("layers.") and len(parameter.shape) == 2:
            factor = 1 / sqrt(N)
        assert wide[name].init.std == pytest.approx(factor * parameter.init.std)
        # With the depth's factor on the outputs, only the base model's depth counts.
        if name.endswith(("attention.o.weight", "mlp.down.weight")):
            factor *= sqrt(L)
        assert both[name].init.std == pytest.approx(factor * parameter.init.std)


def test_outputs_and_logits_are_divided() -> None:
    plain = make_model()
    assert (plain.residual_factor, plain.logit_factor) == (1, 1)
    wide = make_model(base_hidden_size=16)
    assert (wide.residual_factor, wide.logit_factor) == (1, 1 / N)
    both = make_model(base_hidden_size=16, base_num_layers=2, depth_alpha=0.5)
    scaled = both.model_copy(update={"residual_scale": 2.0, "logit_scale": 3.0})
    assert scaled.residual_factor == pytest.approx(2 * L**-0.5)
    assert scaled.logit_factor == pytest.approx(3 / N)


@pytest.mark.parametrize(
    ("decay", "weight_decay"), [("lr", 0.1 * N), ("schedule", 0.1), ("l2", 0.1)]
)
def test_a_matrix_decays_as_much_as_in_the_base_model(
    decay: str, weight_decay: float
) -> None:
    fields = {"lr": 1e-3, "weight_decay": 0.1, "decay": decay, "eps": 1e-8}
    # A group's own factor stays beside that of the width.
    groups = [{"parameters": ["layers.0.*"], "lr_scale": 0.5}]
    rules = UpdateRules(OptimizerConfig.model_validate(fields | {"groups": groups}))
    parameters = by_name(make_model(base_hidden_size=16))
    rule = rules.of(parameters["layers.0.mlp.up.weight"])
    assert rule.weight_decay == pytest.approx(weight_decay)
    assert rule.lr_scale == pytest.approx(0.5 / N)
    assert rule.eps == pytest.approx(1e-8 / N)
    assert rules.of(parameters["embedding.weight"]).weight_decay == 0.1


def test_numbers_that_change_over_the_steps_keep_their_factors() -> None:
    schedule = {"kind": "linear", "end": 0.0}
    fields = {"lr": 1e-3, "weight_decay": 0.1, "weight_decay_schedule": schedule}
    rules = UpdateRules(OptimizerConfig.model_validate(fields))
    parameters = by_name(make_model(base_hidden_size=16))
    rule = rules.of(parameters["layers.0.mlp.up.weight"])
    later = rule.with_numbers({"weight_decay": 0.05, "eps": 1e-6})
    assert later.weight_decay == pytest.approx(0.05 * N)
    assert later.eps == pytest.approx(1e-6 / N)
    assert later.lr_scale == rule.lr_scale
