"""Injected faults that no rule would notice, or that strike nothing."""

from typing import Any

import pytest
from pydantic import ValidationError

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.validation.check import find_problems, find_warnings

NOT_FINITE = {"when": "not_finite", "action": "stop", "rerun": True}
SPIKE = {"when": "loss_spike", "action": "stop", "samples": 50}
FAULT = {"kind": "transient", "breaks": "not_finite", "steps": [20]}


def config(*faults: dict[str, Any], rules: Any = (NOT_FINITE,), dp: Any = 2) -> TrainConfig:
    return TrainConfig.from_mapping(
        {
            "model": {"preset": "gpt-tiny"},
            "data": {"train": [{"path": "builtin://python-stdlib"}]},
            "parallel": {"dp": dp},
            "training": {
                "seq_length": 256,
                "micro_batch_size": 4,
                "global_batch_size": 16,
                "steps": 1000,
                "rules": list(rules),
                "inject_faults": list(faults),
            },
            "optimizer": {"lr": 1e-3},
        }
    )


def test_a_rehearsal_has_no_problem_and_a_warning() -> None:
    spikes = {"kind": "correct", "breaks": "loss_spike", "every_steps": 10, "rank": 1}
    legal = config(FAULT, spikes, rules=[SPIKE, NOT_FINITE])
    assert find_problems(legal) == []
    (warning,) = find_warnings(legal)
    assert (warning.pointer, warning.code) == ("/training/inject_faults", "rehearsal")
    assert warning.detail == (
        "the run is a rehearsal: 2 faults are injected into its numbers, and its rules act "
        "on them; leave inject_faults out of a run that counts"
    )
    assert find_warnings(config()) == []


@pytest.mark.parametrize(
    ("fault", "rules", "pointer", "words"),
    [
        (
            FAULT,
            [],
            "breaks",
            "breaks=not_finite is what no rule looks for; add one to training.rules with "
            "when=not_finite",
        ),
        (
            FAULT | {"breaks": "large_grad_norm"},
            [NOT_FINITE],
            "breaks",
            "add one to training.rules with when=large_grad_norm, or use breaks=not_finite",
        ),
        (
            FAULT,
            [NOT_FINITE | {"rerun": False}],
            "kind",
            "kind=transient is distinguished by computing the step again, which "
            "training.rules[0] does not; set its rerun: true, or use kind=correct",
        ),
        (
            FAULT | {"every_steps": 5},
            [NOT_FINITE],
            "steps",
            "both steps and every_steps are given; give one of them",
        ),
        (
            {"kind": "correct", "breaks": "not_finite"},
            [NOT_FINITE],
            "steps",
            "neither steps nor every_steps is given; give one of them",
        ),
        (
            FAULT | {"steps": [5, 1001]},
            [NOT_FINITE],
            "steps",
            "step 1001 is beyond the run's last step, 1000; strike earlier ones",
        ),
        (
            FAULT | {"steps": None, "every_steps": 1001},
            [NOT_FINITE],
            "every_steps",
            "step 1001 is beyond the run's last step, 1000",
        ),
        (
            FAULT | {"kind": "correct", "breaks": "loss_spike"},
            [SPIKE, SPIKE | {"samples": 30}],
            "steps",
            "step 20 is one of the first 30, after which rules with when=loss_spike have a "
            "baseline; strike step 31 or later",
        ),
    ],
)
def test_each_problem(fault: dict[str, Any], rules: Any, pointer: str, words: str) -> None:
    (problem,) = find_problems(config(fault, rules=rules))
    assert problem.pointer == f"/training/inject_faults/0/{pointer}"
    assert words in problem.detail


def test_a_rank_that_the_run_does_not_have_is_noted() -> None:
    elsewhere = FAULT | {"rank": 2}
    _, warning = find_warnings(config(FAULT, elsewhere))
    assert warning.pointer == "/training/inject_faults/1/rank"
    assert warning.detail == (
        "there is no rank 2: the run has 2 ranks, numbered from 0, so the fault strikes nothing"
    )
    (rehearsal,) = find_warnings(config(elsewhere, dp="auto"))
    assert rehearsal.code == "rehearsal"


@pytest.mark.parametrize("field", [{"kind": "random"}, {"breaks": "loss"}, {"steps": []}])
def test_lists_are_closed(field: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        config(FAULT | field)
