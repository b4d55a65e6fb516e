"""Which command running ranks get, and when an attempt is over."""

from pathlib import Path
from typing import Any

import pytest

from megatron_ray.commands import Command
from workers.decisions.failures import Failure, FailureKind
from workers.decisions.observations import (
    AttemptExited,
    AttemptFailed,
    AttemptFinished,
)
from workers.driver.attempt.outcome import (
    RanksStopped,
    StopDecision,
    attempt_end,
    attempt_failure,
    decide_stop,
)
from workers.driver.attempt.plan import AttemptPlan
from workers.protocol.states import DesiredState
from workers.protocol.wire import DesiredJob
from workers.rank.messages import RankState


def plan(**fields: Any) -> AttemptPlan:
    return AttemptPlan(
        attempt=1,
        epoch=1,
        places=(),
        storage_path=str(Path("/nowhere")),
        keep_last=1,
        grace_s=60,
        manifest={},
        last_commit=0,
        **fields,
    )


def desire(state: str, *, final_checkpoint: bool = True) -> DesiredJob:
    return DesiredJob(
        job_id="job-a",
        desired=DesiredState(state),
        revision=1,
        spec={},
        job_dir="/nowhere",
        token="t",
        final_checkpoint=final_checkpoint,
    )


def test_ranks_go_on_unless_something_is_to_stop_them() -> None:
    assert decide_stop(plan(), None) is None
    assert decide_stop(plan(), desire("run")) is None
    assert decide_stop(plan(), desire("prepare")) is None


@pytest.mark.parametrize("state", ["cancel", "pause"])
def test_a_stop_is_journaled_and_saves_unless_it_is_not_to(state: str) -> None:
    stop = decide_stop(plan(), desire(state))
    assert stop == StopDecision(Command.CHECKPOINT_AND_STOP, DesiredState(state))
    stop = decide_stop(plan(), desire(state, final_checkpoint=False))
    assert stop == StopDecision(Command.STOP, DesiredState(state))


def test_a_stop_that_was_begun_is_repeated_while_the_service_is_away() -> None:
    begun = plan(stopping=DesiredState.CANCEL)
    stop = decide_stop(begun, None)
    assert stop == StopDecision(Command.CHECKPOINT_AND_STOP, None), "journaled already"
    assert decide_stop(begun, desire("run")) is None, "the service's word is newer"
    stop = decide_stop(begun, desire("pause"))
    assert stop == StopDecision(Command.CHECKPOINT_AND_STOP, DesiredState.PAUSE)


def test_ranks_of_another_version_always_save_before_they_stop() -> None:
    stop = decide_stop(plan(renew=True), desire("run", final_checkpoint=False))
    assert stop == StopDecision(Command.CHECKPOINT_AND_STOP, None)
    stop = decide_stop(plan(renew=True), desire("cancel", final_checkpoint=False))
    assert stop == StopDecision(Command.STOP, DesiredState.CANCEL)


@pytest.mark.parametrize(
    ("states", "end"),
    [
        ({RankState.RUNNING, RankState.FINISHED}, None),
        ({RankState.IDLE}, None),
        ({RankState.FINISHED}, AttemptFinished()),
        ({RankState.EXITED}, AttemptExited()),
        ({RankState.STOPPED}, RanksStopped()),
        ({RankState.STOPPED, RankState.FINISHED}, RanksStopped()),
    ],
)
def test_an_attempt_is_over_when_every_rank_is(
    states: set[RankState], end: AttemptFinished | AttemptExited | RanksStopped | None
) -> None:
    assert attempt_end(states) == end


def test_a_failure_names_its_cause_and_the_ranks_that_must_go() -> None:
    echo = Failure(FailureKind.COLLATERAL, "connection closed", rank=0, order=0)
    died = Failure(FailureKind.PROCESS_DIED, "died", rank=2, order=1)
    assert attempt_failure([echo, died], {2}, range(4)) == AttemptFailed(died, (2,))
    hung = Failure(FailureKind.HANG, "no rank reported anything")
    assert attempt_failure([hung], set(), range(4)) == AttemptFailed(hung, (0, 1, 2, 3))
