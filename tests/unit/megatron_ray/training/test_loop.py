"""How steps are read, reported and agreed on, without a model."""

from typing import Any

import pytest
import torch

from megatron_ray.commands import Command, strongest_voted, votes_for
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.optimizer.step_sums import StepSums
from megatron_ray.reports import Report, StepReport
from megatron_ray.training.progress import Progress, SkippedSteps, is_due
from megatron_ray.training.reporting.step_numbers import StepsInFlight
from megatron_ray.training.reporting.step_reporter import NonFiniteLossError, StepReporter
from megatron_ray.training.reporting.step_timer import StepTimes
from megatron_ray.training.rules.checks import StepChecks
from tests.support.parity import LLAMA, make_config

TIMES = StepTimes(0.5, {"data": 0.1})
CPU = torch.device("cpu")


def sums(*values: float, command: Command = Command.CONTINUE) -> StepSums:
    return StepSums(torch.tensor([*values, *votes_for(command)], dtype=torch.float64))


@pytest.mark.parametrize("command", list(Command))
def test_a_vote_of_one_rank_is_the_command_of_all(command: Command) -> None:
    others = votes_for(Command.CONTINUE)
    counts = [vote + other for vote, other in zip(votes_for(command), others, strict=True)]
    assert strongest_voted(counts) is command


def test_the_strongest_vote_wins_and_counts_do_not_add_up() -> None:
    counts = [
        3 * one + other
        for one, other in zip(
            votes_for(Command.CHECKPOINT), votes_for(Command.STOP), strict=True
        )
    ]
    assert strongest_voted(counts) is Command.STOP
    assert not Command.STOP.saves
    assert Command.CHECKPOINT_AND_STOP.saves
    assert Command.CHECKPOINT_AND_STOP.stops
    assert not Command.CHECKPOINT.stops


def test_what_is_due() -> None:
    assert [step for step in range(1, 10) if is_due(3, Progress(step))] == [3, 6, 9]
    assert not is_due(None, Progress(3))


def test_numbers_of_a_step_are_means_over_its_tokens() -> None:
    in_flight = StepsInFlight(CPU, num_aux=2)
    in_flight.add(
        Progress(4, 32),
        1e-3,
        TIMES,
        sums(30.0, 10.0, 400.0, 5.0, 1.0, command=Command.STOP),
    )
    (numbers,) = in_flight.pop_arrived()
    assert (numbers.loss, numbers.grad_norm, numbers.num_tokens) == (3.0, 2.0, 10.0)
    assert numbers.other_losses == (0.5, 0.1)
    assert numbers.command is Command.STOP
    assert numbers.host.progress == Progress(4, 32)
    assert in_flight.pop_all() == []


def test_on_cuda_numbers_are_read_one_step_late(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "megatron_ray.training.reporting.step_numbers"
    monkeypatch.setattr(f"{module}.device.peak_memory_bytes", lambda _: 0)
    in_flight = StepsInFlight(torch.device("cuda"), num_aux=0)
    popped = []
    for step in (1, 2, 3):
        in_flight.add(Progress(step), 1e-3, TIMES, sums(1.0, 1.0, 1.0))
        popped.append([numbers.host.progress.step for numbers in in_flight.pop_arrived()])
    assert popped == [[], [1], [2]]
    assert [numbers.host.progress.step for numbers in in_flight.pop_all()] == [3]


def test_a_step_is_reported_and_what_is_not_finite_is_refused_behind_its_report() -> None:
    reports: list[Report] = []
    config = make_config(LLAMA, {"dp": 1}, steps=1)
    reporter = StepReporter(
        config,
        ParallelMesh.single(),
        reports.append,
        Progress(),
        StepChecks(config.training, reports.append),
    )
    in_flight = StepsInFlight(CPU, num_aux=0)
    for step, loss_sum in ((1, 20.0), (2, float("nan")), (3, 20.0)):
        in_flight.add(Progress(step, 8 * step), 1e-3, TIMES, sums(loss_sum, 10.0, 100.0))
    with pytest.raises(NonFiniteLossError, match=r"loss of step 2 is nan .*; lower optim"):
        reporter.steps(in_flight.pop_all())
    first, second = reports
    assert isinstance(first, StepReport)
    assert isinstance(second, StepReport)
    expected: dict[str, Any] = {
        "step": 1,
        "loss": 2.0,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "num_tokens": 10,
        "consumed_samples": 8,
        "step_s": 0.5,
        "tokens_per_s": 20.0,
        "mfu": 0.0,
        "split_s": {"data": 0.1},
        "other_losses": {},
    }
    assert {name: getattr(first, name) for name in expected} == expected
    assert second.step == 2


def test_the_error_names_the_steps_to_leave_out() -> None:
    reports: list[Report] = []
    config = make_config(LLAMA, {"dp": 1}, steps=9)
    training = config.training.model_copy(update={"skip_steps": (1, 2)})
    reporter = StepReporter(
        config.model_copy(update={"training": training}),
        ParallelMesh.single(),
        reports.append,
        Progress(),
        StepChecks(config.training, reports.append),
    )
    in_flight = StepsInFlight(CPU, num_aux=0)
    for step in (1, 2, 3):
        in_flight.add(Progress(step), 1e-3, TIMES, sums(float("nan"), 1.0, 1.0))
    with pytest.raises(
        NonFiniteLossError, match=r"training\.skip_steps=\[1,2,3\], or look"
    ):
        reporter.steps(in_flight.pop_all())
    assert reporter.skipped == SkippedSteps(total=1, consecutive=1, left_out=2)
