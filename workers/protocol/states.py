"""Defines the states of jobs and attempts.

Owns: the one table of legal transitions and the closed set of status reasons. Pure.
"""

from enum import StrEnum


class JobState(StrEnum):
    """Observed state of a job; the requested state is `DesiredState`."""

    PREPARING = "preparing"
    QUEUED = "queued"
    SCHEDULING = "scheduling"
    STARTING = "starting"
    RUNNING = "running"
    RECOVERING = "recovering"
    PAUSED = "paused"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        """Whether the job has ended; only a request to resume it changes the state."""
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)

    @property
    def holds_resources(self) -> bool:
        """Whether the job counts against the cluster's capacity."""
        return (
            self not in (JobState.PREPARING, JobState.QUEUED, JobState.PAUSED)
            and not self.is_terminal
        )


ACTIVE_STATES = tuple([state.value for state in JobState if not state.is_terminal])
"""The states of jobs that have not ended."""


class DesiredState(StrEnum):
    """State that the user or admission requests from a job's driver."""

    PREPARE = "prepare"
    RUN = "run"
    PAUSE = "pause"
    CANCEL = "cancel"


class AttemptState(StrEnum):
    """State of an attempt: one run of all ranks, from rendezvous to end."""

    STARTING = "starting"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"


class StatusReason(StrEnum):
    """Reason of a job's state: a closed set that clients may switch on."""

    WAITING_AGENT = "waiting_agent"
    WAITING_QUOTA = "waiting_quota"
    WAITING_GANG = "waiting_gang"
    WAITING_NODES = "waiting_nodes"
    PREPARING_DATA = "preparing_data"
    WORKER_DIED = "worker_died"
    NODE_LOST = "node_lost"
    GPU_ERROR = "gpu_error"
    BAD_NODES = "bad_nodes"
    HANG = "hang"
    PREEMPTED = "preempted"
    OOM = "oom"
    NAN_LOSS = "nan_loss"
    TRAINING_RULE = "training_rule"
    NO_PROGRESS = "no_progress"
    BUDGET_SPENT = "budget_spent"
    PLANNED_EXIT = "planned_exit"
    USER_CANCELLED = "user_cancelled"
    USER_PAUSED = "user_paused"
    STACK_STOPPED = "stack_stopped"
    SPEC_INVALID = "spec_invalid"
    STORAGE_ERROR = "storage_error"
    INTERNAL = "internal"


# From the state on the left, a job may change to those on the right. The service
# ignores records of other changes, so a late or repeated record of a restarted driver
# cannot move a job backwards.
_S = JobState
_END = frozenset({_S.FAILED, _S.CANCELLED})

TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    _S.PREPARING: frozenset({_S.QUEUED, _S.CANCELLING}) | _END,
    _S.QUEUED: frozenset({_S.SCHEDULING, _S.CANCELLING, _S.PAUSED}) | _END,
    _S.SCHEDULING: frozenset({_S.STARTING, _S.QUEUED, _S.CANCELLING, _S.PAUSED}) | _END,
    _S.STARTING: frozenset(
        {_S.RUNNING, _S.RECOVERING, _S.CANCELLING, _S.PAUSED, _S.QUEUED, _S.SUCCEEDED}
    )
    | _END,
    _S.RUNNING: frozenset({_S.SUCCEEDED, _S.RECOVERING, _S.PAUSED, _S.CANCELLING}) | _END,
    _S.RECOVERING: frozenset(
        {
            _S.STARTING,
            _S.RUNNING,
            _S.QUEUED,
            _S.SCHEDULING,
            _S.CANCELLING,
            _S.PAUSED,
            _S.SUCCEEDED,
        }
    )
    | _END,
    _S.PAUSED: frozenset({_S.QUEUED, _S.CANCELLING}) | _END,
    _S.CANCELLING: frozenset({_S.SUCCEEDED}) | _END,
    _S.SUCCEEDED: frozenset(),
    _S.FAILED: frozenset(),
    _S.CANCELLED: frozenset(),
}


def may_follow(current: JobState, new: JobState) -> bool:
    """Returns whether a job may change from `current` to `new`.

    Repeating the current state is not a transition and always allowed.
    """
    return new == current or new in TRANSITIONS[current]
