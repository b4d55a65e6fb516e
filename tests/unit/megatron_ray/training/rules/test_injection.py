"""Which faults strike a step, and what they make of a rank's numbers."""

from math import isnan
from typing import Any

import pytest
import torch

from megatron_ray.config.training import TrainingConfig
from megatron_ray.optimizer.step_rules import StepRules
from megatron_ray.optimizer.step_sums import NUM_FIXED
from megatron_ray.training.rules.checks import Recheck, StepChecks
from megatron_ray.training.rules.injection import STRUCK, FaultInjector, Judging, strike_

RULES = [
    {"when": "not_finite", "action": "skip", "rerun": True},
    {"when": "loss_spike", "action": "skip", "samples": 3},
    {"when": "large_grad_norm", "action": "skip", "limit": 2.0**64},
]


def training(*faults: dict[str, Any], **fields: Any) -> TrainingConfig:
    values = {"seq_length": 8, "global_batch_size": 1, "steps": 9, "rules": RULES}
    return TrainingConfig.model_validate(values | {"inject_faults": faults} | fields)


def fault(kind: str = "transient", breaks: str = "not_finite", **fields: Any) -> Any:
    return {"kind": kind, "breaks": breaks} | (fields or {"steps": [4]})


def struck_steps(
    config: TrainingConfig, rank: int = 0, recheck: Recheck | None = None
) -> list[int]:
    checks = StepChecks(config, lambda _: None, recheck)
    injector = FaultInjector(config, rank)
    return [step for step in range(1, 10) if injector.judging(step, checks).faults]


def test_steps_are_struck_on_their_rank_by_number_alone() -> None:
    config = training(fault(steps=[2, 7]), fault("correct", every_steps=4, rank=1))
    assert struck_steps(config) == [2, 7]
    assert struck_steps(config, rank=1) == [4, 8]
    assert struck_steps(config, rank=2) == []


def test_steps_that_are_left_out_are_not_struck() -> None:
    config = training(fault("correct", every_steps=4), skip_steps=[4])
    assert struck_steps(config) == [8]


@pytest.mark.parametrize(
    ("has_moved", "kinds"),
    [(False, ["transient", "persistent", "correct"]), (True, ["correct"])],
)
def test_other_devices_have_only_the_faults_of_the_step_itself(
    has_moved: bool, kinds: list[str]
) -> None:
    config = training(*(fault(kind) for kind in ("transient", "persistent", "correct")))
    checks = StepChecks(config, lambda _: None, Recheck(True, 4, has_moved=has_moved))
    judging = FaultInjector(config, 0).judging(4, checks)
    assert [item.kind for item in judging.faults] == kinds
    assert judging.is_confirmed


def test_a_run_without_faults_is_judged_plainly() -> None:
    config = training()
    checks = StepChecks(config, lambda _: None)
    assert FaultInjector(config, 0).judging(1, checks) == Judging()


def struck(rules: StepRules, *faults: dict[str, Any], num_tokens: int = 10) -> list[float]:
    values = torch.ones(NUM_FIXED + 1, dtype=torch.float64)
    strike_(values, training(*faults).inject_faults, num_tokens, rules)
    return values.tolist()


def test_only_the_number_that_a_rule_compares_changes() -> None:
    rules = StepRules(training(), torch.device("cpu"))
    loss, *others = struck(rules, fault())
    assert isnan(loss)
    assert others == [1, 1, 1]
    large_norm = struck(rules, fault(breaks="large_grad_norm"))
    assert large_norm == [1, 1, pytest.approx((10 * STRUCK) ** 2), 1]
    # Also on a rank whose documents are all padding.
    assert struck(rules, fault(breaks="large_grad_norm"), num_tokens=0)[2] > 1e59
    assert struck(rules) == [1, 1, 1, 1]


def test_a_rule_without_a_baseline_is_not_tried() -> None:
    rules = StepRules(training(), torch.device("cpu"))
    assert struck(rules, fault(breaks="loss_spike")) == [1, 1, 1, 1]
    state = rules.sharded_state()["optimizer/rules/loss_spike-first_max-3-10"]
    (box,) = state.boxes
    box.tensor.copy_(torch.tensor([3.0, 5.0, 4.0, 3.0]))
    assert struck(rules, fault(breaks="loss_spike")) == [10 * STRUCK, 1, 1, 1]
