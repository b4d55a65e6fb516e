"""Rules for steps that contradict each other, or have no effect."""

from typing import Any

import pytest
from pydantic import ValidationError

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.validation.check import find_problems, find_warnings

SPIKE = {"when": "loss_spike", "action": "stop"}


def config(
    *rules: dict[str, Any], zero: int = 1, every_steps: int | None = 2, **training: Any
) -> TrainConfig:
    return TrainConfig.from_mapping(
        {
            "model": {"preset": "gpt-tiny"},
            "data": {"train": [{"path": "builtin://python-stdlib"}]},
            "parallel": {"zero": zero},
            "training": {
                "seq_length": 256,
                "micro_batch_size": 4,
                "global_batch_size": 16,
                "steps": 1000,
                "rules": list(rules),
            }
            | training,
            "optimizer": {"lr": 1e-3},
            "checkpoint": {"every_steps": every_steps},
        }
    )


def test_usual_rules_have_no_problem() -> None:
    usual = config(
        SPIKE,
        {"when": "not_finite", "action": "rollback", "rerun": True},
        {"when": "large_grad_norm", "action": "skip", "baseline": "recent_median"},
        {"when": "large_grad_norm", "action": "skip", "limit": 100},
        max_skipped_steps=5,
        check_replicas_every_steps=100,
    )
    assert find_problems(usual) == []
    assert find_warnings(usual) == []


@pytest.mark.parametrize(
    ("rules", "options", "pointer", "words"),
    [
        (
            [{"when": "not_finite", "action": "stop", "before_reduction": True}],
            {"zero": 3},
            "/training/rules/0/before_reduction",
            "before_reduction checks a rank's own gradients, which torch reduces by itself "
            "with parallel.zero=3; leave it out, or use zero=1",
        ),
        (
            [SPIKE | {"before_reduction": True}],
            {},
            "/training/rules/0/before_reduction",
            "before_reduction is for when=not_finite, not loss_spike; leave it out",
        ),
        (
            [SPIKE | {"action": "skip"}],
            {},
            "/training/rules/0/action",
            "action=skip needs training.max_skipped_steps, the number of steps of the job that "
            "may be skipped, which is 0; set it",
        ),
        (
            [SPIKE | {"action": "rollback"}],
            {"max_rollbacks": 0},
            "/training/rules/0/action",
            "action=rollback needs training.max_rollbacks above 0",
        ),
        (
            [SPIKE, SPIKE | {"action": "rollback"}],
            {},
            "/training/rules/1",
            "compares the same numbers as training.rules[0], which comes first",
        ),
        (
            [{"when": "not_finite", "action": "stop", "factor": 5}],
            {},
            "/training/rules/0/factor",
            "factor has no effect on when=not_finite; leave it out",
        ),
        (
            [SPIKE | {"limit": 8, "samples": 5}],
            {},
            "/training/rules/0/samples",
            "samples is for a rule without limit=8; leave one out",
        ),
        (
            [SPIKE | {"back_steps": 5}],
            {},
            "/training/rules/0/back_steps",
            "back_steps is for action=rollback, not stop; leave it out",
        ),
        (
            [],
            {"zero": 3, "check_replicas_every_steps": 5},
            "/training/check_replicas_every_steps",
            "compares whole weights, of which every rank has another shard with "
            "parallel.zero=3; leave it out, or use zero=1",
        ),
    ],
)
def test_each_problem(
    rules: list[dict[str, Any]], options: dict[str, Any], pointer: str, words: str
) -> None:
    (problem,) = find_problems(config(*rules, **options))
    assert problem.pointer == pointer
    assert words in problem.detail


@pytest.mark.parametrize(
    ("rule", "every_steps", "words"),
    [
        (
            SPIKE | {"samples": 1000},
            2,
            "samples=1000 is not below training.steps=1000, so no step can break the rule",
        ),
        (
            SPIKE | {"action": "rollback", "leave_out": 3},
            None,
            "action=rollback by 3 steps or more goes back to the beginning of the run without "
            "checkpoint.every_steps",
        ),
    ],
)
def test_each_warning(rule: dict[str, Any], every_steps: int | None, words: str) -> None:
    (warning,) = find_warnings(config(rule, every_steps=every_steps))
    assert words in warning.detail


@pytest.mark.parametrize("rule", [{"when": "spike"}, {"action": "retry"}, {"factor": 1}])
def test_lists_are_closed(rule: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        config(SPIKE | rule)
