"""An agent of one job's cluster ends with the job, and its code is that of the job."""

from collections.abc import Mapping

import pytest

from workers.agent.idleness import (
    EXIT_NOT_SUCCEEDED,
    EXIT_SERVED,
    LEFTOVERS_S,
    NO_JOB_S,
    Idleness,
)
from workers.protocol.states import JobState

ACTIVE = [state for state in JobState if not state.is_terminal]


def after(*replies: Mapping[str, JobState]) -> Idleness:
    idleness = Idleness()
    for states in replies:
        idleness.set_states(states)
    return idleness


@pytest.mark.parametrize("state", ACTIVE)
def test_it_stays_while_a_job_has_not_ended(state: JobState) -> None:
    idleness = after({"a": JobState.SUCCEEDED, "b": state})
    assert idleness.exit_code(0, has_actors=False) is None
    assert idleness.exit_code(1e6, has_actors=False) is None


@pytest.mark.parametrize(
    ("state", "code"),
    [
        (JobState.SUCCEEDED, EXIT_SERVED),
        (JobState.FAILED, EXIT_NOT_SUCCEEDED),
        (JobState.CANCELLED, EXIT_NOT_SUCCEEDED),
    ],
)
def test_its_code_is_that_of_the_job(state: JobState, code: int) -> None:
    idleness = after({"a": JobState.RUNNING}, {"a": state})
    assert idleness.exit_code(0, has_actors=False) == code


def test_jobs_that_ended_before_it_came_do_not_count() -> None:
    idleness = after(
        {"old": JobState.FAILED, "a": JobState.QUEUED},
        {"old": JobState.FAILED, "a": JobState.SUCCEEDED},
    )
    assert idleness.exit_code(0, has_actors=False) == EXIT_SERVED


def test_one_failure_among_several_jobs_is_a_failure() -> None:
    idleness = after(
        {"a": JobState.RUNNING, "b": JobState.RUNNING},
        {"a": JobState.SUCCEEDED, "b": JobState.FAILED},
    )
    assert idleness.exit_code(0, has_actors=False) == EXIT_NOT_SUCCEEDED


def test_a_job_that_was_deleted_has_not_succeeded() -> None:
    assert after({"a": JobState.RUNNING}, {}).exit_code(0, has_actors=False) == 1


def test_drivers_of_ended_jobs_get_time_to_exit() -> None:
    idleness = after({"a": JobState.RUNNING}, {"a": JobState.SUCCEEDED})
    assert idleness.exit_code(0, has_actors=True) is None
    assert idleness.exit_code(LEFTOVERS_S - 1, has_actors=True) is None
    assert idleness.exit_code(LEFTOVERS_S, has_actors=True) == EXIT_SERVED


@pytest.mark.parametrize("states", [{}, {"a": JobState.FAILED}])
def test_without_a_job_it_gives_up_after_a_minute(states: Mapping[str, JobState]) -> None:
    idleness = after(states)
    assert idleness.exit_code(0, has_actors=False) is None
    assert idleness.exit_code(NO_JOB_S - 1, has_actors=False) is None
    assert idleness.exit_code(NO_JOB_S, has_actors=False) == EXIT_NOT_SUCCEEDED


def test_a_job_that_comes_late_starts_the_wait_anew() -> None:
    idleness = after({})
    assert idleness.exit_code(0, has_actors=False) is None
    idleness.set_states({"a": JobState.PREPARING})
    assert idleness.exit_code(NO_JOB_S - 1, has_actors=False) is None
    idleness.set_states({"a": JobState.SUCCEEDED})
    assert idleness.exit_code(NO_JOB_S, has_actors=False) == EXIT_SERVED
