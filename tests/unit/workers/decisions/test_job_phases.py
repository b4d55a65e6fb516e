"""Every transition of a job's driver: what is observed in which phase, and what follows."""

import json
from dataclasses import replace
from typing import Any, get_args

import pytest

from megatron_ray.checkpoint.records.rollbacks import Rollback
from workers.decisions.failures import Failure, FailureKind
from workers.decisions.faults.rollbacks import RollbackPlan
from workers.decisions.job_phases import (
    TRANSITIONS,
    AttemptStatus,
    InvalidTransitionError,
    JobStatus,
    Transition,
    next_phase,
)
from workers.decisions.journal_entry import (
    DeadRank,
    Ending,
    FailedAttempt,
    JournalEntry,
    Phase,
    ResourcesReleased,
)
from workers.decisions.observations import (
    AttemptAbandoned,
    AttemptExited,
    AttemptFailed,
    AttemptFinished,
    AttemptStopped,
    DataPrepared,
    DataRejected,
    NothingToResume,
    Observation,
    Placed,
    PlacementTimedOut,
    PreparationFailed,
    RanksStarted,
    RestartDecided,
    ResumeRequested,
    RunRequested,
    StopRequested,
)
from workers.decisions.placement import RankPlace
from workers.decisions.restart_policy import RestartDecision, RestartHistory
from workers.protocol.states import AttemptState, DesiredState, JobState, StatusReason

HISTORY = RestartHistory(failures=2, preemptions=1, commits_at_failure=(0, 4))
RETRY = RestartDecision(True, 1.5, StatusReason.WORKER_DIED, "died", HISTORY)
GIVE_UP = RestartDecision(False, 0.0, StatusReason.BUDGET_SPENT, "died", HISTORY)
CAUSE = Failure(FailureKind.PROCESS_DIED, "died", rank=1, detail="x" * 5000)
CANCEL = StopRequested(DesiredState.CANCEL, 7)
PAUSE = StopRequested(DesiredState.PAUSE, 7)
RESUME = ResumeRequested(1, {"name": "longer"}, 9)

ROWS: list[tuple[Phase, Observation, Phase]] = [
    (Phase.PREPARING, DataPrepared({"train": []}), Phase.READY),
    (Phase.PREPARING, DataRejected("/data: none"), Phase.ENDING),
    (Phase.PREPARING, PreparationFailed("no memory"), Phase.ENDING),
    (Phase.PREPARING, CANCEL, Phase.ENDING),
    (Phase.READY, RunRequested(), Phase.SCHEDULING),
    (Phase.READY, CANCEL, Phase.ENDING),
    (Phase.READY, PAUSE, Phase.READY),
    (Phase.SCHEDULING, Placed("2", "/c/4", 4), Phase.STARTING),
    (Phase.SCHEDULING, NothingToResume("all damaged"), Phase.ENDING),
    (Phase.SCHEDULING, PlacementTimedOut("too full", 7), Phase.READY),
    (Phase.SCHEDULING, CANCEL, Phase.ENDING),
    (Phase.SCHEDULING, PAUSE, Phase.READY),
    (Phase.STARTING, RanksStarted(), Phase.RUNNING),
    (Phase.STARTING, AttemptFailed(CAUSE), Phase.RECOVERING),
    (Phase.STARTING, AttemptAbandoned(), Phase.RECOVERING),
    (Phase.STARTING, CANCEL, Phase.ENDING),
    (Phase.STARTING, PAUSE, Phase.READY),
    (Phase.RUNNING, AttemptFinished(), Phase.ENDING),
    (Phase.RUNNING, AttemptExited(), Phase.ENDING),
    (Phase.RUNNING, AttemptStopped(DesiredState.CANCEL, 7), Phase.ENDING),
    (Phase.RUNNING, AttemptStopped(DesiredState.PAUSE, 7), Phase.READY),
    (Phase.RUNNING, AttemptStopped(DesiredState.RUN, 7), Phase.RECOVERING),
    (Phase.RUNNING, AttemptFailed(CAUSE, (1,)), Phase.RECOVERING),
    (Phase.RECOVERING, RestartDecided(RETRY), Phase.RECOVERING),
    (Phase.RECOVERING, RestartDecided(GIVE_UP), Phase.ENDING),
    (Phase.RECOVERING, Placed("2", None), Phase.STARTING),
    (Phase.RECOVERING, NothingToResume("all damaged"), Phase.ENDING),
    (Phase.RECOVERING, PlacementTimedOut("too full", 7), Phase.READY),
    (Phase.RECOVERING, CANCEL, Phase.ENDING),
    (Phase.RECOVERING, PAUSE, Phase.READY),
    (Phase.ENDING, RESUME, Phase.PREPARING),
]


def place(rank: int) -> RankPlace:
    return RankPlace(
        rank=rank,
        slot=rank,
        bundle=0,
        node_id="n",
        address="10.0.0.1",
        gpu=None,
        pid=100 + rank,
        local_rank=rank,
        local_world_size=2,
        node_rank=0,
        coordinates={},
    )


def entry(phase: Phase, **fields: Any) -> JournalEntry:
    ranks = (place(0), place(1))
    return JournalEntry(job_id="job-a", phase=phase, attempt=3, ranks=ranks, **fields)


def after(transition: Transition, before: JournalEntry) -> JournalEntry:
    """The journal entry after a transition, as a restarted driver reads it."""
    changes = {"phase": transition.phase, **transition.journal}
    text = before.model_copy(update=changes).model_dump_json()
    return JournalEntry.model_validate(json.loads(text))


@pytest.mark.parametrize(("phase", "observation", "target"), ROWS)
def test_each_transition_leads_to_its_phase(
    phase: Phase, observation: Observation, target: Phase
) -> None:
    before = entry(phase)
    transition = next_phase(before, observation)
    assert transition.phase is target
    written = after(transition, before)
    assert written.phase is target
    # What a phase needs to know is in the journal, so that a successor can enter there.
    assert (written.ending is not None) == (target is Phase.ENDING)
    is_released = target is Phase.READY and phase is not Phase.PREPARING
    assert (written.given_back is not None) == is_released


def test_the_rows_above_are_the_whole_table() -> None:
    assert {(phase, type(seen)) for phase, seen, _ in ROWS} == set(TRANSITIONS)
    assert {kind for _, kind in TRANSITIONS} == set(get_args(Observation))
    assert {phase for phase, _ in TRANSITIONS} == set(Phase)
    assert [kind for phase, kind in TRANSITIONS if phase is Phase.ENDING] == [
        ResumeRequested
    ], "only the user reverses the end"


@pytest.mark.parametrize("phase", Phase)
def test_everything_else_is_a_bug(phase: Phase) -> None:
    samples = {type(seen): seen for _, seen, _ in ROWS}
    for kind, observation in samples.items():
        if (phase, kind) not in TRANSITIONS:
            name = f"{kind.__name__} cannot happen in phase {phase.value}"
            with pytest.raises(InvalidTransitionError, match=name):
                next_phase(entry(phase), observation)


def test_every_phase_can_be_cancelled_and_all_after_preparation_paused() -> None:
    for phase in set(Phase) - {Phase.ENDING, Phase.RUNNING}:
        ending = next_phase(entry(phase), CANCEL).journal["ending"]
        assert ending == Ending(state="cancelled", reason="user_cancelled")
    for phase in (Phase.READY, Phase.SCHEDULING, Phase.STARTING, Phase.RECOVERING):
        released = next_phase(entry(phase), PAUSE).journal["given_back"]
        assert released == ResourcesReleased(
            state="paused", reason=None, message="", revision=7
        )


def test_a_resumed_job_continues_with_a_new_budget_and_the_same_data() -> None:
    before = entry(
        Phase.ENDING,
        prepared={"train": []},
        failures=2,
        commits_at_failure=(4,),
        last_commit=4,
        ending=Ending(state="failed", reason="budget_spent"),
    )
    written = after(next_phase(before, RESUME), before)
    assert written.phase is Phase.READY, "data are not prepared a second time"
    assert written.given_back == ResourcesReleased(
        state="queued", reason=None, message="ready to run", revision=9
    )
    assert (written.spec, written.resumes) == ({"name": "longer"}, 1)
    assert (written.failures, written.commits_at_failure) == (0, ())
    assert (written.attempt, written.last_commit) == (3, 4)
    assert written.ending is None
    other_data = replace(RESUME, has_other_data=True)
    written = after(next_phase(before, other_data), before)
    assert (written.phase, written.prepared) == (Phase.PREPARING, None)


def test_an_attempt_that_is_stopped_while_it_starts_is_closed() -> None:
    for request in (CANCEL, PAUSE):
        transition = next_phase(entry(Phase.STARTING), request)
        assert transition.attempt == AttemptStatus(AttemptState.STOPPED)
        assert next_phase(entry(Phase.RECOVERING), request).attempt is None


def test_data_that_were_rejected_are_recorded_already() -> None:
    ending = next_phase(entry(Phase.PREPARING), DataRejected("/data: none")).journal[
        "ending"
    ]
    assert ending.is_recorded
    assert (ending.reason, ending.message) == ("spec_invalid", "/data: none")
    failed = next_phase(entry(Phase.PREPARING), PreparationFailed("x")).journal["ending"]
    assert not failed.is_recorded
    assert failed.reason == "internal"


def test_a_new_attempt_starts_from_the_newest_checkpoint_and_nothing_else() -> None:
    before = entry(
        Phase.RECOVERING,
        stopping=DesiredState.PAUSE,
        failed=FailedAttempt(kind=FailureKind.HANG, message="m"),
    )
    written = after(next_phase(before, Placed("2", "/c/4", 4)), before)
    assert (written.attempt, written.code_version) == (4, "2")
    assert (written.resumed_from, written.last_commit) == ("/c/4", 4)
    assert written.stopping is None
    assert written.failed is None
    written = after(next_phase(before, Placed("2", None)), before)
    assert (written.resumed_from, written.last_commit) == (None, 0)


def test_a_job_that_runs_again_forgets_the_release_and_the_old_map() -> None:
    released = ResourcesReleased(state="queued", reason=None, message="", revision=1)
    before = entry(Phase.READY, given_back=released)
    transition = next_phase(before, RunRequested())
    assert transition.job is None, "it is recorded in the phase"
    written = after(transition, before)
    assert written.given_back is None
    assert written.ranks == ()


def test_a_placement_that_timed_out_waits_in_the_queue() -> None:
    seen = PlacementTimedOut("too full", 7)
    released = next_phase(entry(Phase.SCHEDULING), seen).journal["given_back"]
    assert (released.state, released.reason) == ("queued", "waiting_gang")
    assert (released.message, released.revision) == ("too full", 7)


def test_a_failure_is_journaled_until_it_is_judged() -> None:
    before = entry(Phase.RUNNING)
    written = after(next_phase(before, AttemptFailed(CAUSE, (1,))), before)
    assert written.failed is not None
    assert (written.failed.kind, written.failed.rank) == (FailureKind.PROCESS_DIED, 1)
    assert len(written.failed.detail) == 4000
    assert written.dead == (DeadRank(attempt=3, place=place(1)),)
    judged = next_phase(written, RestartDecided(RETRY))
    assert judged.delay_s == 1.5
    assert judged.job == JobStatus(JobState.RECOVERING, StatusReason.WORKER_DIED, "died")
    written = after(judged, written)
    assert written.failed is None
    assert (written.failures, written.preemptions) == (2, 1)
    assert written.commits_at_failure == (0, 4)


def test_a_rollback_is_journaled_with_the_decision_and_kept_on_a_resume() -> None:
    facts = {"step": 9, "leave_out": 1, "max_step": 7}
    cause = Failure(FailureKind.ROLLBACK, "the loss of step 9 is 30", rank=0, facts=facts)
    before = entry(Phase.RUNNING, last_commit=8)
    failed = after(next_phase(before, AttemptFailed(cause)), before)
    assert failed.failed is not None
    assert failed.failed.facts == facts
    rollback = Rollback(attempt=3, step=9, leave_out=1, max_step=7)
    decided = RestartDecided(RETRY, RollbackPlan(rollback, 4))
    written = after(next_phase(failed, decided), failed)
    assert (written.rollbacks, written.last_commit) == ((rollback,), 4)
    # A successor that decides once more changes nothing.
    assert after(next_phase(written, decided), written).rollbacks == (rollback,)
    ended = entry(Phase.ENDING, rollbacks=written.rollbacks)
    resumed = after(next_phase(ended, ResumeRequested(1, {}, 8)), ended)
    assert resumed.rollbacks == (rollback,)
    refused = RestartDecided(GIVE_UP, RollbackPlan(None, refusal="no checkpoint"))
    written = after(next_phase(failed, refused), failed)
    assert (written.rollbacks, written.last_commit) == ((), 8)


def test_a_damaged_checkpoint_is_remembered_until_the_user_resumes_the_job() -> None:
    cause = Failure(FailureKind.CHECKPOINT, "other bytes", rank=0)
    before = entry(
        Phase.RUNNING, resumed_from="/c/8", damaged={"/c/9": "a file is missing"}
    )
    written = after(next_phase(before, AttemptFailed(cause)), before)
    assert written.damaged == {"/c/9": "a file is missing", "/c/8": "other bytes"}
    other = after(next_phase(before, AttemptFailed(CAUSE)), before)
    assert other.damaged == before.damaged
    before = entry(Phase.READY, damaged=written.damaged)
    assert after(next_phase(before, RunRequested()), before).damaged == written.damaged
    before = entry(Phase.ENDING, damaged=written.damaged)
    resumed = next_phase(before, ResumeRequested(1, {}, 8))
    assert after(resumed, before).damaged == {}


def test_a_job_without_a_whole_checkpoint_fails_instead_of_beginning_anew() -> None:
    transition = next_phase(entry(Phase.RECOVERING), NothingToResume("all damaged"))
    ending = transition.journal["ending"]
    assert (ending.state, ending.reason) == ("failed", "storage_error")
    assert ending.message == "all damaged"


def test_giving_up_spends_the_budget_and_ends_in_one_step() -> None:
    before = entry(Phase.RECOVERING)
    written = after(next_phase(before, RestartDecided(GIVE_UP)), before)
    assert written.failures == 2
    assert written.ending is not None
    assert (written.ending.state, written.ending.reason) == ("failed", "budget_spent")


def test_files_of_the_dead_are_kept_in_mind_until_an_attempt_runs() -> None:
    earlier = (DeadRank(attempt=2, place=place(0)),)
    failed = AttemptFailed(CAUSE, (1,))
    starting = entry(Phase.STARTING, dead=earlier)
    written = after(next_phase(starting, failed), starting)
    assert [(rank.attempt, rank.place.rank) for rank in written.dead] == [(2, 0), (3, 1)]
    running = entry(Phase.RUNNING, dead=earlier)
    written = after(next_phase(running, failed), running)
    assert [(rank.attempt, rank.place.rank) for rank in written.dead] == [(3, 1)]


def test_ranks_that_are_renewed_are_recovering_without_a_failure() -> None:
    before = entry(Phase.RUNNING, stopping=DesiredState.PAUSE)
    seen = AttemptStopped(DesiredState.RUN, 7, "for a new version")
    transition = next_phase(before, seen)
    assert transition.attempt == AttemptStatus(
        AttemptState.STOPPED, None, "for a new version"
    )
    assert transition.job == JobStatus(JobState.RECOVERING, None, "for a new version")
    written = after(transition, before)
    assert written.failed is None
    assert written.stopping is None
    assert written.failures == 0


def test_the_end_of_an_attempt_is_recorded_before_the_end_of_the_job() -> None:
    finished = next_phase(entry(Phase.RUNNING), AttemptFinished())
    assert finished.attempt == AttemptStatus(AttemptState.SUCCEEDED)
    assert finished.job is None, "the job's state is recorded last, after the clean-up"
    forced = next_phase(entry(Phase.RUNNING), AttemptStopped(DesiredState.CANCEL, 7, "f"))
    assert forced.attempt == AttemptStatus(AttemptState.STOPPED, None, "f")
    assert forced.journal["ending"].message == "f"
