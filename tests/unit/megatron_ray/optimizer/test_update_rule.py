"""Which numbers a parameter is updated with."""

import pytest

from megatron_ray.config.optimizer import OptimizerConfig, SwitchConfig
from megatron_ray.optimizer.update_rule import UpdateRule, UpdateRules
from megatron_ray.sharding.parameter_types import Init, LogicalParameter

GROUPS = [
    {"parameters": ["embedding.*", "*.bias"], "weight_decay": 0.0, "lr_scale": 0.1},
    {"parameters": ["layers.1.*"], "weight_decay": 0.3, "beta1": 0.8},
    {"parameters": ["layers.1.norm.weight"], "eps": 1e-6, "beta2": 0.9},
]
CONFIG = OptimizerConfig.model_validate(
    {"lr": 1.0, "weight_decay": 0.1, "eps": 1e-8, "groups": GROUPS}
)


def adamw(
    weight_decay: float, lr_scale: float, beta1: float, beta2: float, eps: float
) -> UpdateRule:
    return UpdateRule(weight_decay, lr_scale, beta1, beta2, eps)


@pytest.mark.parametrize(
    ("name", "decay", "expected"),
    [
        ("head.weight", True, adamw(0.1, 1.0, 0.9, 0.95, 1e-8)),
        ("final_norm.weight", False, adamw(0.0, 1.0, 0.9, 0.95, 1e-8)),
        ("embedding.weight", True, adamw(0.0, 0.1, 0.9, 0.95, 1e-8)),
        ("layers.1.mlp.up.weight", True, adamw(0.3, 1.0, 0.8, 0.95, 1e-8)),
        # The last group that sets a number determines it; other numbers stay.
        ("layers.1.mlp.up.bias", False, adamw(0.3, 0.1, 0.8, 0.95, 1e-8)),
        ("layers.1.norm.weight", False, adamw(0.3, 1.0, 0.8, 0.9, 1e-6)),
    ],
)
def test_groups_change_the_optimizers_numbers(
    name: str, decay: bool, expected: UpdateRule
) -> None:
    parameter = LogicalParameter(name, (4,), Init("zeros"), None, decay)
    assert UpdateRules(CONFIG).of(parameter) == expected


@pytest.mark.parametrize(
    ("name", "decay", "expected"),
    [
        ("head.weight", True, (0.5, 0.7, 0.95)),
        # No decay stays no decay, and what a group sets stays too.
        ("final_norm.weight", False, (0.0, 0.7, 0.95)),
        ("embedding.weight", True, (0.0, 0.7, 0.95)),
        ("layers.1.mlp.up.weight", True, (0.3, 0.8, 0.95)),
    ],
)
def test_varying_numbers_leave_those_of_groups_alone(
    name: str, decay: bool, expected: tuple[float, float, float]
) -> None:
    varying = CONFIG.model_copy(
        update={"switches": (SwitchConfig(step=2, beta1=0.7, weight_decay=0.5),)}
    )
    parameter = LogicalParameter(name, (4,), Init("zeros"), None, decay)
    rule = UpdateRules(varying).of(parameter)
    changed = rule.with_numbers({"beta1": 0.7, "weight_decay": 0.5})
    assert (changed.weight_decay, changed.beta1, changed.beta2) == expected


def test_rules_without_varying_numbers_stay_as_few() -> None:
    """A norm without decay is updated with a weight without decay."""
    plain = UpdateRules(OptimizerConfig(lr=1.0))
    rules = set()
    for decay in (True, False):
        rules.add(plain.of(LogicalParameter("a", (4,), Init("zeros"), None, decay)))
    assert len(rules) == 1


def test_only_matrices_of_muon_are_updated_whole() -> None:
    groups = [{"parameters": ["*.router.weight", "head.*"], "lr_scale": 3.0}]
    fields = {"lr": 1.0, "adamw_lr_scale": 0.5, "groups": groups}
    config = OptimizerConfig.model_validate({"name": "muon", **fields})
    expected = {
        ("embedding.weight", False): (False, 0.5),
        ("head.weight", False): (False, 3.0),
        ("layers.0.attention.q.weight", True): (True, 1.0),
        ("layers.0.moe.router.weight", True): (True, 3.0),
    }
    for (name, is_matrix), numbers in expected.items():
        parameter = LogicalParameter(
            name, (4, 4), Init("zeros"), None, decay=True, is_matrix=is_matrix
        )
        rule = UpdateRules(config).of(parameter)
        assert (rule.of_matrix, rule.lr_scale) == numbers
        assert not UpdateRules(CONFIG).of(parameter).of_matrix
