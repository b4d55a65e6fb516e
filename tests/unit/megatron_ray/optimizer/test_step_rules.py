"""Verdicts on the device, against the same rules in plain Python."""

from math import inf, nan
from statistics import median
from typing import Any

import pytest
import torch

from megatron_ray.config.training import TrainingConfig
from megatron_ray.optimizer.step_rules import StepRules
from megatron_ray.optimizer.step_sums import NUM_FIXED, StepSums, Verdict

CPU = torch.device("cpu")
PART = torch.zeros(NUM_FIXED, dtype=torch.float64)


def rules_of(*rules: dict[str, Any], **training: Any) -> StepRules:
    values = {"seq_length": 8, "global_batch_size": 1, "steps": 9, "rules": rules}
    return StepRules(TrainingConfig.model_validate(values | training), CPU)


def judge(rules: StepRules, loss: float, norm: float = 1.0, **options: Any) -> Verdict:
    scale = options.pop("scale", None)
    if scale is not None:
        scale = torch.tensor(scale, dtype=torch.float64)
    # Sums over 4 tokens.
    values = torch.tensor([4 * loss, 4.0, (4 * norm) ** 2], dtype=torch.float64)
    return rules.judge(StepSums(values, loss_scale=scale), PART, **options)


LOSSES = [3.0, 2.0, 5.0, 6.0, 51.0, 4.0, nan, 2.0, 9.0, 30.0, 1.0, 2.0, 2.0, 21.0]


def test_a_spike_is_above_the_maximum_of_the_first_steps() -> None:
    rules = rules_of({"when": "loss_spike", "action": "skip", "samples": 3})
    skipped = [bool(judge(rules, loss).skip) for loss in LOSSES]
    # 10 x the maximum of 3, 2 and 5.
    assert skipped == [loss > 50 for loss in LOSSES]


def test_a_spike_is_above_the_median_of_the_last_good_steps() -> None:
    rule = {"when": "loss_spike", "action": "skip", "baseline": "recent_median"}
    rules = rules_of(rule | {"samples": 3, "factor": 4})
    good: list[float] = []
    for loss in LOSSES:
        limit = inf
        if len(good) >= 3:
            limit = 4 * median(good[-3:])
        verdict = judge(rules, loss)
        assert bool(verdict.skip) == (loss > limit)
        assert verdict.limits.tolist() == [limit]
        if loss <= limit:
            good.append(loss)


def test_of_several_broken_rules_the_first_one_counts() -> None:
    rules = rules_of(
        {"when": "large_grad_norm", "action": "skip", "limit": 5},
        {"when": "loss_spike", "action": "stop", "limit": 2},
    )
    both = judge(rules, 3.0, 6.0)
    assert both.broken.tolist() == [1.0, 0.0]
    assert both.limits.tolist() == [5.0, 2.0]
    assert not both.halted, "so that the run goes on"
    assert judge(rules, 3.0, 1.0).broken.tolist() == [0.0, 1.0]


def test_after_a_stop_nothing_changes_until_the_run_goes_on() -> None:
    rules = rules_of(
        {"when": "not_finite", "action": "rollback"},
        {"when": "loss_spike", "action": "skip", "samples": 2},
    )
    judge(rules, 1.0)
    before = {name: entry.boxes[0].tensor.clone() for name, entry in state(rules)}
    assert judge(rules, nan).halted
    later = judge(rules, 1.0)
    assert (bool(later.skip), later.broken.tolist()) == (True, [0.0, 0.0])
    for name, entry in state(rules):
        assert torch.equal(entry.boxes[0].tensor, before[name])
    rules.resume()
    assert not judge(rules, 1.0).skip


def state(rules: StepRules) -> list[tuple[str, Any]]:
    return list(rules.sharded_state().items())


def test_only_rules_with_a_baseline_have_state() -> None:
    rules = rules_of(
        {"when": "not_finite", "action": "stop"},
        {"when": "loss_spike", "action": "stop", "limit": 2},
        {"when": "loss_spike", "action": "stop", "samples": 5, "factor": 2.5},
    )
    assert [name for name, _ in state(rules)] == [
        "optimizer/rules/loss_spike-first_max-5-2.5"
    ]


@pytest.mark.parametrize("is_confirmed", [False, True])
def test_a_step_to_be_computed_again_halts_until_it_was(is_confirmed: bool) -> None:
    rules = rules_of({"when": "not_finite", "action": "skip", "rerun": True})
    verdict = judge(rules, nan, is_confirmed=is_confirmed)
    assert bool(verdict.skip)
    assert bool(verdict.halted) is not is_confirmed


def test_an_overflow_that_lowers_the_scale_breaks_no_rule() -> None:
    rules = rules_of({"when": "not_finite", "action": "skip"}, precision="fp16")
    assert not judge(rules, 1.0, inf, scale=1024.0).skip
    assert judge(rules, 1.0, inf, scale=1.0).skip, "it cannot be lowered"
    assert judge(rules, nan, inf, scale=1024.0).skip, "the loss is not scaled yet"


def test_numbers_that_are_not_finite_break_their_own_rule_only() -> None:
    rules = rules_of({"when": "large_grad_norm", "action": "skip", "limit": 5})
    assert not judge(rules, 1.0, inf).skip


def test_the_part_of_the_rejected_step_is_kept() -> None:
    rules = rules_of({"when": "not_finite", "action": "stop"})
    values = torch.tensor([nan, 4.0, 1.0], dtype=torch.float64)
    rules.judge(StepSums(values), PART + 1)
    rules.judge(StepSums(values), PART + 2)
    assert rules.rejected_part.tolist() == [1.0, 1.0, 1.0]


def test_the_host_reads_no_number() -> None:
    meta = torch.device("meta")
    values = {"seq_length": 8, "global_batch_size": 1, "steps": 9, "precision": "fp16"}
    listed = [
        {"when": "not_finite", "action": "stop"},
        {"when": "loss_spike", "action": "rollback", "rerun": True},
        {"when": "large_grad_norm", "action": "skip", "baseline": "recent_median"},
    ]
    training = TrainingConfig.model_validate(values | {"rules": listed})
    rules = StepRules(training, meta)
    sums = StepSums(
        torch.zeros(NUM_FIXED, dtype=torch.float64, device=meta),
        loss_scale=torch.zeros((), dtype=torch.float64, device=meta),
    )
    # On this device there is none: reading it would raise.
    verdict = rules.judge(sums, torch.zeros(NUM_FIXED, dtype=torch.float64, device=meta))
    assert verdict.skip.device == meta
    assert verdict.broken.shape == verdict.limits.shape == (3,)
