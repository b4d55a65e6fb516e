"""Decides what a job's driver does next: one state machine, pure and tabulated.

Owns: every transition between phases, and the records and journal fields that belong to
it. Must not know: how anything is done, clocks, Ray, torch, HTTP.

    PREPARING
        │ DataPrepared
        v
    READY <─────────────────────────────────────┐
        │ RunRequested                          │ PlacementTimedOut
        v                                       │ StopRequested(pause)
    SCHEDULING ─────────────────────────────────┤ AttemptStopped(pause)
        │ Placed                                │
        v                                       │
    STARTING <────────────────┐ ────────────────┤
        │ RanksStarted        │                 │
        v                     │ Placed          │
    RUNNING ──────────────────┼─────────────────┤
        │ AttemptFailed       │                 │
        v AttemptStopped(run) │                 │
    RECOVERING ───────────────┘ ────────────────┘
        ^     │
        └─────┘ RestartDecided(retry)

    STARTING ──AttemptFailed, AttemptAbandoned──> RECOVERING
    any phase but RUNNING ──StopRequested(cancel)──> ENDING
    PREPARING ──DataRejected, PreparationFailed──> ENDING
    RUNNING ──AttemptFinished, AttemptExited, AttemptStopped(cancel)──> ENDING
    RECOVERING ──RestartDecided(give up)──> ENDING
    SCHEDULING, RECOVERING ──NothingToResume──> ENDING
    ENDING ──ResumeRequested──> PREPARING, or READY when the data are prepared

The driver works in a phase until it observes something, calls `next_phase`, sends the
records of the transition and writes the journal. If it dies anywhere in between, its
successor resumes in the journal's phase and observes again; records that were already
sent are not sent twice.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_ray.checkpoint.records.rollbacks import with_rollback
from workers.decisions.failures import FailureKind
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
from workers.decisions.planned_exit import reached_limit
from workers.exceptions import WorkersError
from workers.protocol.states import AttemptState, DesiredState, JobState, StatusReason

_MAX_DETAIL = 4000
"""Characters of a traceback that a journal entry keeps: its end names the cause."""


class InvalidTransitionError(WorkersError):
    """Something was observed in a phase in which it cannot happen: a bug."""


# ---- what follows


@dataclass(frozen=True)
class JobStatus:
    """A job's state to be recorded."""

    state: JobState
    reason: StatusReason | None = None
    message: str = ""


@dataclass(frozen=True)
class AttemptStatus:
    """An attempt's state to be recorded."""

    state: AttemptState
    reason: StatusReason | None = None
    message: str = ""


@dataclass(frozen=True)
class Transition:
    """The phase to enter, and what is recorded and journaled before.

    Records are sent before the journal is written: until then a successor repeats the
    transition, and repeated records are dropped. In the opposite order a record could
    be lost.
    """

    phase: Phase
    journal: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the journal entry that change with the phase."""
    attempt: AttemptStatus | None = None
    job: JobStatus | None = None
    delay_s: float = 0.0
    """Seconds to wait before the next attempt."""


def next_phase(entry: JournalEntry, observation: Observation) -> Transition:
    """Returns the transition that an observation causes in the journal's phase.

    Raises InvalidTransitionError when the table has no such row.
    """
    # A missing row is a bug in the driver, not a transition without effect.
    rule = TRANSITIONS.get((entry.phase, type(observation)))
    if rule is None:
        name = type(observation).__name__
        raise InvalidTransitionError(f"{name} cannot happen in phase {entry.phase.value}")
    return rule(entry, observation)


# ---- one rule per observation; its phase only matters where the rule tests it


def _data_prepared(entry: JournalEntry, observed: DataPrepared) -> Transition:
    # Journaled, so that a successor does not prepare the data again.
    return Transition(Phase.READY, {"prepared": dict(observed.prepared)})


def _data_rejected(entry: JournalEntry, observed: DataRejected) -> Transition:
    # The record of the problems has already failed the job in the service.
    status = JobStatus(JobState.FAILED, StatusReason.SPEC_INVALID, observed.message)
    return _end(status, is_recorded=True)


def _preparation_failed(entry: JournalEntry, observed: PreparationFailed) -> Transition:
    return _end(JobStatus(JobState.FAILED, observed.reason, observed.message))


def _run_requested(entry: JournalEntry, observed: RunRequested) -> Transition:
    # The state is recorded within the phase, not here: a successor that re-enters READY
    # would record the release a second time.
    return Transition(Phase.SCHEDULING, {"given_back": None, "ranks": ()})


def _stop_requested(entry: JournalEntry, observed: StopRequested) -> Transition:
    return _stop(observed.desired, observed.revision, None)


def _start_cancelled(entry: JournalEntry, observed: StopRequested) -> Transition:
    # Unlike in the other phases, the end of an attempt must be recorded.
    return _stop(observed.desired, observed.revision, AttemptStatus(AttemptState.STOPPED))


def _resume_requested(entry: JournalEntry, observed: ResumeRequested) -> Transition:
    # Attempt, epoch and the newest commit stay: the job continues where it ended.
    journal = {
        "resumes": observed.resumes,
        "spec": dict(observed.spec),
        "ending": None,
        "stopping": None,
        "failed": None,
        # Damaged checkpoints are read again, because the user may have restored them.
        "damaged": {},
        "dead": (),
        # A new budget: the user has decided that the job is worth further attempts.
        "failures": 0,
        "preemptions": 0,
        "commits_at_failure": (),
        "last_error": "",
        "measured_nodes": (),
        "given_back": None,
    }
    if entry.prepared is None or observed.has_other_data:
        return Transition(Phase.PREPARING, {**journal, "prepared": None})
    # Otherwise the same prepared data, so that the order of samples continues. The state
    # is recorded on entry into READY, like that of a job that has released its resources.
    journal["given_back"] = ResourcesReleased(
        state=JobState.QUEUED.value,
        reason=None,
        message="ready to run",
        revision=observed.revision,
    )
    return Transition(Phase.READY, journal)


def _placed(entry: JournalEntry, observed: Placed) -> Transition:
    # A new attempt has its own journal file; that of the previous attempt is final.
    journal = {
        "attempt": entry.attempt + 1,
        "code_version": observed.code_version,
        "resumed_from": observed.checkpoint_path,
        "last_commit": observed.checkpoint_step,
        "copies": observed.copies,
        "dp": observed.dp,
        "stopping": None,
        "failed": None,
        # From now on only the cluster's list counts.
        "avoid": {},
    }
    return Transition(Phase.STARTING, journal)


def _nothing_to_resume(entry: JournalEntry, observed: NothingToResume) -> Transition:
    # The job's progress must not be lost without the user's consent.
    return _end(JobStatus(JobState.FAILED, StatusReason.STORAGE_ERROR, observed.message))


def _placement_timed_out(entry: JournalEntry, observed: PlacementTimedOut) -> Transition:
    # No budget is charged: a full cluster is not a failure of the job.
    status = JobStatus(JobState.QUEUED, StatusReason.WAITING_GANG, observed.message)
    released = _release(status, observed.revision, None)
    # It may be what kept the job from being placed.
    return replace(released, journal={**released.journal, "avoid": {}})


def _ranks_started(entry: JournalEntry, observed: RanksStarted) -> Transition:
    # The job's state becomes RUNNING with the first step, which may be minutes away.
    return Transition(Phase.RUNNING)


def _attempt_abandoned(entry: JournalEntry, observed: AttemptAbandoned) -> Transition:
    # The driver died, not the ranks: nothing is charged to the job's budget.
    status = AttemptStatus(AttemptState.STOPPED, None, "abandoned while starting")
    return Transition(Phase.RECOVERING, {"failed": None}, attempt=status)


def _attempt_finished(entry: JournalEntry, observed: AttemptFinished) -> Transition:
    attempt = AttemptStatus(AttemptState.SUCCEEDED)
    return _end(JobStatus(JobState.SUCCEEDED), attempt)


def _attempt_exited(entry: JournalEntry, observed: AttemptExited) -> Transition:
    # The job has done what its spec asks for, so it is not run again: only the user knows
    # when the next hours of the cluster are its own.
    # The ranks have ended with a checkpoint, which is the newest one.
    limit = reached_limit((entry.spec or {}).get("training", {}), entry.last_commit)
    message = (
        f"ended after step {entry.last_commit} by {limit}; "
        f"`megatron-ray resume {entry.job_id}` goes on from its checkpoint"
    )
    attempt = AttemptStatus(AttemptState.SUCCEEDED, StatusReason.PLANNED_EXIT, message)
    status = JobStatus(JobState.SUCCEEDED, StatusReason.PLANNED_EXIT, message)
    return _end(status, attempt)


def _attempt_stopped(entry: JournalEntry, observed: AttemptStopped) -> Transition:
    attempt = AttemptStatus(AttemptState.STOPPED, None, observed.message)
    if observed.desired in (DesiredState.CANCEL, DesiredState.PAUSE):
        return _stop(observed.desired, observed.revision, attempt)
    # Stopped for another size or a new version of the code, or the pause was revoked.
    return Transition(
        Phase.RECOVERING,
        {"failed": None, "stopping": None, "lost_nodes": ()},
        attempt=attempt,
        job=JobStatus(JobState.RECOVERING, None, observed.message),
    )


def _attempt_failed(entry: JournalEntry, observed: AttemptFailed) -> Transition:
    cause = observed.cause
    failed = FailedAttempt(
        kind=cause.kind,
        message=cause.message,
        rank=cause.rank,
        detail=cause.detail[-_MAX_DETAIL:],
        step=cause.step,
        dead_ranks=observed.dead_ranks,
        facts=dict(cause.facts),
    )
    damaged = dict(entry.damaged)
    if cause.kind is FailureKind.CHECKPOINT and entry.resumed_from is not None:
        damaged[entry.resumed_from] = cause.message
    dead = {}
    # Files of earlier dead ranks are fetched once an attempt runs. If this attempt
    # never ran, those ranks stay listed, because no fetch has been started.
    if entry.phase is not Phase.RUNNING:
        dead = {(rank.attempt, rank.place.rank): rank for rank in entry.dead}
    for place in entry.ranks:
        if place.rank in observed.dead_ranks:
            rank = DeadRank(attempt=entry.attempt, place=place)
            dead[entry.attempt, place.rank] = rank
    journal = {"failed": failed, "dead": tuple(dead.values()), "damaged": damaged}
    return Transition(Phase.RECOVERING, journal)


def _restart_decided(entry: JournalEntry, observed: RestartDecided) -> Transition:
    decision = observed.decision
    spent: dict[str, Any] = {
        "failures": decision.history.failures,
        "preemptions": decision.history.preemptions,
        "commits_at_failure": decision.history.commits_at_failure,
        "last_error": decision.history.last_error,
        "failed": None,
    }
    plan = observed.rollback
    if plan is not None and plan.rollback is not None:
        spent["rollbacks"] = with_rollback(entry.rollbacks, plan.rollback)
        spent["last_commit"] = plan.step
    # Budget and ending are written at once. A driver that died between two writes would
    # start an attempt beyond the budget.
    if not decision.retry:
        status = JobStatus(JobState.FAILED, decision.reason, decision.message)
        return _end(status, journal=spent)
    status = JobStatus(JobState.RECOVERING, decision.reason, decision.message)
    return Transition(Phase.RECOVERING, spent, job=status, delay_s=decision.delay_s)


def _stop(
    desired: DesiredState, revision: int, attempt: AttemptStatus | None
) -> Transition:
    """Ends a job that is cancelled; releases the resources of one that is paused."""
    message = ""
    if attempt is not None:
        message = attempt.message
    # A paused job waits in READY, from where it may run again; a cancelled one ends.
    if desired is DesiredState.CANCEL:
        status = JobStatus(JobState.CANCELLED, StatusReason.USER_CANCELLED, message)
        return _end(status, attempt)
    return _release(JobStatus(JobState.PAUSED, None, message), revision, attempt)


def _release(status: JobStatus, revision: int, attempt: AttemptStatus | None) -> Transition:
    """Returns to READY; the state is recorded once the resources are released."""
    released = ResourcesReleased(
        state=status.state.value,
        reason=status.reason,
        message=status.message,
        revision=revision,
    )
    return Transition(Phase.READY, {"given_back": released}, attempt=attempt)


def _end(
    status: JobStatus,
    attempt: AttemptStatus | None = None,
    *,
    is_recorded: bool = False,
    journal: Mapping[str, Any] | None = None,
) -> Transition:
    """Ends the job; its state is recorded last, after the clean-up."""
    ending = Ending(
        state=status.state.value,
        reason=status.reason,
        message=status.message,
        is_recorded=is_recorded,
    )
    return Transition(Phase.ENDING, {**(journal or {}), "ending": ending}, attempt=attempt)


Rule = Callable[[JournalEntry, Any], Transition]

TRANSITIONS: dict[tuple[Phase, type], Rule] = {
    # Phases without resources: CPU work on the data, then the queue.
    (Phase.PREPARING, DataPrepared): _data_prepared,
    (Phase.PREPARING, DataRejected): _data_rejected,
    (Phase.PREPARING, PreparationFailed): _preparation_failed,
    (Phase.PREPARING, StopRequested): _stop_requested,
    (Phase.READY, RunRequested): _run_requested,
    (Phase.READY, StopRequested): _stop_requested,
    # The service has admitted the job; Ray places it.
    (Phase.SCHEDULING, Placed): _placed,
    (Phase.SCHEDULING, NothingToResume): _nothing_to_resume,
    (Phase.SCHEDULING, PlacementTimedOut): _placement_timed_out,
    (Phase.SCHEDULING, StopRequested): _stop_requested,
    # One attempt, from its first process to its last report.
    (Phase.STARTING, RanksStarted): _ranks_started,
    (Phase.STARTING, AttemptFailed): _attempt_failed,
    (Phase.STARTING, AttemptAbandoned): _attempt_abandoned,
    (Phase.STARTING, StopRequested): _start_cancelled,
    (Phase.RUNNING, AttemptFinished): _attempt_finished,
    (Phase.RUNNING, AttemptExited): _attempt_exited,
    (Phase.RUNNING, AttemptStopped): _attempt_stopped,
    (Phase.RUNNING, AttemptFailed): _attempt_failed,
    # Between two attempts; living processes and the placement group are kept.
    (Phase.RECOVERING, RestartDecided): _restart_decided,
    (Phase.RECOVERING, Placed): _placed,
    (Phase.RECOVERING, NothingToResume): _nothing_to_resume,
    (Phase.RECOVERING, PlacementTimedOut): _placement_timed_out,
    (Phase.RECOVERING, StopRequested): _stop_requested,
    # The end, which only the user's request reverses.
    (Phase.ENDING, ResumeRequested): _resume_requested,
}
"""All transitions."""
