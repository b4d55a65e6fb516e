"""Runs of one rank with rules: what a bad step leads to."""

from dataclasses import replace
from math import inf
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ray.commands import Command
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.reports import Report, RuleReport, SkippedStepReport, StepReport
from megatron_ray.training.components import TrainingComponents
from megatron_ray.training.profiling.profiler import NO_PROFILER
from megatron_ray.training.progress import Progress
from megatron_ray.training.reporting.step_numbers import StepsInFlight
from megatron_ray.training.rules.checks import Recheck
from megatron_ray.training.rules.errors import (
    RecheckError,
    RollbackError,
    RuleError,
    RuleStopError,
)
from megatron_ray.training.rules.run import train_by_rules
from megatron_ray.training.session import batch_maker, build
from tests.support.faulty_steps import Fault, FaultySteps
from tests.support.parity import LLAMA, RandomDataset, boxes, make_config

BAD = 3
TINY: dict[str, Any] = LLAMA | {"hidden_size": 16, "ffn_hidden_size": 16}


class Run:
    """One run in this process; `states` are weights and moments before each step."""

    def __init__(self, rules: list[dict[str, Any]], **training: Any) -> None:
        self.config = configured(rules, **training)
        mesh = ParallelMesh.single()
        model, self.optimizer = build(self.config, mesh)
        self.loader = FaultySteps(
            RandomDataset(self.config.model.vocabulary, 32),
            *(2, 8, 0, 1),
            batch_maker(self.config, mesh),
        )
        self.saved: list[Progress] = []
        self.reports: list[Report] = []
        self.states: list[Any] = []
        self._components = TrainingComponents(
            self.config, mesh, model, self.optimizer, self.loader, None, self
        )

    def save(self, progress: Progress) -> None:
        self.saved.append(progress)
        self.states.append(boxes(self.optimizer.sharded_state()))

    def wait(self) -> None:
        pass

    def train(self, recheck: Recheck | None = None) -> None:
        train_by_rules(
            self._components,
            Progress(),
            self.reports.append,
            lambda: Command.CONTINUE,
            NO_PROFILER,
            recheck or Recheck(),
        )

    @property
    def losses(self) -> dict[int, float]:
        return {
            item.step: item.loss for item in self.reports if isinstance(item, StepReport)
        }

    @property
    def verdicts(self) -> list[tuple[int, str]]:
        return [
            (item.step, item.verdict)
            for item in self.reports
            if isinstance(item, RuleReport)
        ]

    @property
    def skipped(self) -> list[int]:
        return [item.step for item in self.reports if isinstance(item, SkippedStepReport)]


def configured(rules: list[dict[str, Any]], **training: Any) -> TrainConfig:
    config = make_config(TINY, {"dp": 1}, steps=5).model_dump(mode="json")
    config["training"] |= {"rules": rules, "max_skipped_steps": 2} | training
    config["checkpoint"]["every_steps"] = 1
    return TrainConfig.from_mapping(config)


def clean(**training: Any) -> Run:
    run = Run([], **training)
    run.train()
    return run


SPIKE = {"when": "loss_spike", "samples": 2, "factor": 5}


def test_a_rule_that_nothing_breaks_changes_no_bit() -> None:
    rules = [SPIKE | {"action": "rollback", "rerun": True}]
    rules.append({"when": "large_grad_norm", "action": "skip", "samples": 2, "factor": 50})
    run = Run(rules)
    run.train()
    assert run.losses == clean().losses
    assert run.verdicts == []


def test_skip_leaves_out_exactly_the_steps_that_break_the_rule() -> None:
    run = Run([SPIKE | {"action": "skip"}])
    run.loader.steps = (BAD, 5)
    run.train()
    expected = clean(skip_steps=(BAD, 5))
    assert run.skipped == [BAD, 5]
    assert run.losses[4] == expected.losses[4]
    same(run.states[-1], expected.states[-1])
    assert run.saved[-1].num_updates == 3


def test_one_skipped_step_too_many_ends_the_run() -> None:
    run = Run([SPIKE | {"action": "skip"}], max_skipped_steps=1)
    run.loader.steps = (BAD, 5)
    with pytest.raises(RuleStopError, match=r"rules\[0\]\), after the 1 skipped steps of"):
        run.train()


def test_stop_saves_the_state_before_the_step() -> None:
    run = Run([{"when": "not_finite", "action": "stop"}])
    run.loader.steps = (BAD,)
    run.loader.weight = inf
    with pytest.raises(RuleStopError, match="the weights are those of step 2") as error:
        run.train()
    assert error.value.failure_kind == "rule"
    assert [progress.step for progress in run.saved] == [1, 2, 2]
    same(run.states[1], run.states[2])
    assert run.verdicts == [(BAD, "stop")]


def test_rollback_has_the_facts_of_the_restart() -> None:
    run = Run([SPIKE | {"action": "rollback", "back_steps": 2, "leave_out": 2}])
    run.loader.steps = (BAD,)
    with pytest.raises(
        RollbackError, match=r"leaves out the samples of steps 2 to 3"
    ) as error:
        run.train()
    assert error.value.facts == {"step": BAD, "max_step": 1, "leave_out": 2}


def test_a_transient_fault_is_gone_when_the_step_is_computed_again() -> None:
    run = Run([SPIKE | {"action": "stop", "rerun": True}])
    run.loader.steps = (BAD, 5)
    run.loader.fault = Fault.TRANSIENT
    run.train()
    assert run.verdicts == [
        (BAD, "rerun"),
        (BAD, "transient"),
        (5, "rerun"),
        (5, "transient"),
    ]
    expected = clean()
    assert run.losses == expected.losses, "to the bit"
    same(run.states[-1], expected.states[-1])


@pytest.mark.parametrize("fault", [Fault.PERSISTENT, Fault.OF_THE_DATA])
def test_a_fault_that_stays_is_judged_on_other_devices(fault: Fault) -> None:
    run = Run([SPIKE | {"action": "skip", "rerun": True}])
    run.loader.steps = (BAD,)
    run.loader.fault = fault
    with pytest.raises(RecheckError, match="computed on other devices than") as error:
        run.train(Recheck(can_move=True))
    assert error.value.facts == {"step": BAD, "rank": 0}
    assert run.verdicts == [(BAD, "rerun"), (BAD, "recheck")]
    assert error.value.progress.step == BAD - 1
    same(run.states[1], run.states[2])

    other = Run([SPIKE | {"action": "skip", "rerun": True}])
    other.loader.steps = (BAD,)
    other.loader.fault = fault
    other.loader.is_faulty_device = False
    other.train(Recheck(can_move=True, step=BAD, rank=0))
    if fault is Fault.PERSISTENT:
        assert other.verdicts == [(BAD, "persistent")]
        assert other.losses == clean().losses
    else:
        assert other.verdicts == []
        assert other.skipped == [BAD]


def test_a_step_that_is_left_out_proves_no_fault() -> None:
    run = Run([SPIKE | {"action": "rollback", "rerun": True}], skip_steps=(BAD,))
    run.loader.steps = (BAD,)
    run.train(Recheck(can_move=True, step=BAD, rank=0))
    assert run.verdicts == []


def test_without_other_devices_the_action_follows() -> None:
    run = Run([SPIKE | {"action": "skip", "rerun": True}])
    run.loader.steps = (BAD,)
    run.train()
    assert run.verdicts == [(BAD, "rerun")]
    assert run.skipped == [BAD]
    same(run.states[-1], clean(skip_steps=(BAD,)).states[-1])


def test_faults_at_a_rate_are_all_survived() -> None:
    rule = {"when": "loss_spike", "limit": 50, "action": "stop", "rerun": True}
    run = Run([rule], steps=8)
    run.loader.rate = 3
    run.loader.fault = Fault.TRANSIENT
    run.train()
    assert len(run.verdicts) >= 4
    assert {verdict for _, verdict in run.verdicts} == {"rerun", "transient"}
    assert run.losses == clean(steps=8).losses


@pytest.fixture
def late_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host reads a step's numbers one step late, as on GPUs."""
    init = StepsInFlight.__init__

    def one_step_late(self: StepsInFlight, on: torch.device, num_aux: int) -> None:
        init(self, on, num_aux)
        self._lag = 1

    monkeypatch.setattr(StepsInFlight, "__init__", one_step_late)


def unsaved(rules: list[dict[str, Any]], **training: Any) -> Run:
    """A run without checkpoints, before which all numbers are read."""
    run = Run(rules, **training)
    config = run.config.model_dump(mode="json")
    config["checkpoint"]["every_steps"] = None
    changed = TrainConfig.from_mapping(config)
    run._components = replace(run._components, config=changed)
    return run


@pytest.mark.usefixtures("late_numbers")
def test_late_verdicts_lead_to_the_same_run() -> None:
    rule = {"when": "loss_spike", "limit": 100, "action": "skip", "rerun": True}
    transient = unsaved([rule])
    transient.loader.steps = (BAD, 5)
    transient.loader.fault = Fault.TRANSIENT
    transient.train()
    assert transient.losses == clean().losses
    skipped = unsaved([rule])
    skipped.loader.steps = (2, BAD)
    skipped.train()
    assert skipped.verdicts == [(2, "rerun"), (BAD, "rerun")]
    assert skipped.skipped == [2, BAD]
    expected = clean(skip_steps=(2, BAD))
    assert skipped.losses[4] == expected.losses[4]
    same(skipped.states[-1], expected.states[-1])


@pytest.mark.usefixtures("late_numbers")
@pytest.mark.parametrize("action", ["stop", "rollback"])
def test_a_late_verdict_saves_the_state_before_the_step(action: str) -> None:
    run = unsaved([{"when": "loss_spike", "limit": 100, "action": action}])
    run.loader.steps = (BAD,)
    with pytest.raises(RuleError):
        run.train()
    assert [progress.step for progress in run.saved] == [BAD - 1]
    assert run.saved[0].consumed_samples == 8 * (BAD - 1)
    same(run.states[0], clean().states[BAD - 2])


def same(state: Any, other: Any) -> None:
    assert [name for name, _, _ in state if "rules" not in name] == [
        name for name, _, _ in other if "rules" not in name
    ]
    values = {name: values for name, _, values in other}
    for name, _, own in state:
        if "rules" not in name:
            assert np.array_equal(own, values[name]), name


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
