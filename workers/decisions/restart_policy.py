"""Decides whether and when a failed attempt is followed by another.

Owns: the budgets, the back-off and the guard against crash loops. Pure: clocks and
random numbers come in as values. Must not know: Ray, torch.
"""

from dataclasses import dataclass, replace

from workers.decisions.failures import Failure, FailureKind
from workers.protocol.job import RestartConfig
from workers.protocol.states import StatusReason

PROGRESS_ATTEMPTS = 3
"""Failed attempts in a row without a higher committed step that end a job."""
BACKOFF_CAP_S = 60.0
STORAGE_BACKOFF_S = 4.0
"""Shortest wait after the first failure of the storage; doubled for each further one."""
_MAX_ERROR_CHARS = 500
DETERMINISTIC = (
    FailureKind.USER,
    FailureKind.OOM,
    FailureKind.NAN_LOSS,
    FailureKind.RULE,
    FailureKind.DISK_FULL,
)
"""Failures that every further attempt would repeat."""
_UNCOUNTED = (
    FailureKind.CHECKPOINT,
    FailureKind.PREFLIGHT,
    FailureKind.ROLLBACK,
    FailureKind.RECHECK,
)
"""Failures after which the next attempt resumes from an older checkpoint, avoids a bad
node, or does both."""


@dataclass(frozen=True)
class RestartHistory:
    """The budget that a job has spent."""

    failures: int = 0
    preemptions: int = 0
    commits_at_failure: tuple[int, ...] = ()
    """Highest committed step when each failed attempt ended, oldest first."""
    last_error: str = ""
    """The last exception that ended an attempt, with its step."""


@dataclass(frozen=True)
class RestartDecision:
    """Whether to restart, and why."""

    retry: bool
    delay_s: float
    reason: StatusReason
    message: str
    history: RestartHistory
    """The budget spent, this failure included."""


def decide_restart(
    policy: RestartConfig,
    history: RestartHistory,
    cause: Failure,
    last_commit: int,
    jitter: float,
) -> RestartDecision:
    """Returns what follows a failed attempt.

    `history` does not include this failure; `last_commit` is the step of the newest
    committed checkpoint or used copy (0: none); `jitter` is uniform in [0, 1).
    """
    message = cause.sentence()
    # Not counted in the budget: the job ends here whatever its budget is.
    if cause.kind in DETERMINISTIC:
        message = f"{message} (not restarted: the error is deterministic)"
        return RestartDecision(False, 0.0, cause.reason, message, history)
    # Not counted either: each time there is one checkpoint, node, permitted rollback or
    # step to compute again less.
    if cause.kind in _UNCOUNTED:
        return RestartDecision(True, 0.0, cause.reason, message, history)
    # Preemptions are not failures of the job, so they have a separate budget.
    if cause.kind is FailureKind.PREEMPTED:
        return _after_preemption(policy, history, cause)
    error = _error_of(cause)
    commits = (*history.commits_at_failure, last_commit)
    # An outage of the storage is no fault of the job, which may well get past it.
    if cause.kind is FailureKind.STORAGE:
        commits = history.commits_at_failure
    spent = RestartHistory(
        history.failures + 1,
        history.preemptions,
        commits,
        error or history.last_error,
    )
    if spent.failures > policy.max_failures:
        message = (
            f"{message} (failure {spent.failures}, restart.max_failures is "
            f"{policy.max_failures})"
        )
        # With a budget of 0 the failure itself is the reason; "budget spent" would hide
        # it.
        reason = cause.reason
        if spent.failures > 1:
            reason = StatusReason.BUDGET_SPENT
        return RestartDecision(False, 0.0, reason, message, spent)
    # The same exception at the same step is a bug, which no attempt gets past.
    if error and error == history.last_error:
        message = f"{message} (the same error after step {cause.step} as before)"
        return RestartDecision(False, 0.0, StatusReason.NO_PROGRESS, message, spent)
    # A job that always fails at the same step must not use up a large budget.
    is_storage = cause.kind is FailureKind.STORAGE
    if not is_storage and _is_crash_loop(spent.commits_at_failure):
        message = (
            f"{message} ({PROGRESS_ATTEMPTS} attempts failed without a checkpoint beyond step "
            f"{last_commit})"
        )
        return RestartDecision(False, 0.0, StatusReason.NO_PROGRESS, message, spent)
    delay_s = backoff_s(policy, spent.failures, jitter)
    if is_storage:
        delay_s = max(delay_s, storage_backoff_s(spent.failures, jitter))
    return RestartDecision(True, delay_s, cause.reason, message, spent)


def _error_of(cause: Failure) -> str:
    """Returns what identifies an exception of a known step; empty for other failures."""
    if cause.kind is not FailureKind.EXCEPTION or cause.step is None:
        return ""
    return f"step {cause.step}: {cause.message[:_MAX_ERROR_CHARS]}"


def _after_preemption(
    policy: RestartConfig, history: RestartHistory, cause: Failure
) -> RestartDecision:
    """Decides after a preemption, which has a separate budget and is retried at once."""
    spent = replace(history, preemptions=history.preemptions + 1)
    message = cause.sentence()
    if 0 <= policy.max_preemptions < spent.preemptions:
        message = (
            f"{message} (preempted {spent.preemptions} times, restart.max_preemptions is "
            f"{policy.max_preemptions})"
        )
        return RestartDecision(False, 0.0, StatusReason.BUDGET_SPENT, message, spent)
    return RestartDecision(True, 0.0, cause.reason, message, spent)


def backoff_s(policy: RestartConfig, failures: int, jitter: float) -> float:
    """Returns the wait before the attempt that follows failure number `failures`.

    None after the first failure; then it doubles up to 60 s, less up to half by jitter.
    """
    if failures <= 1:
        return 0.0
    # The exponent is bounded so that a large number of failures cannot overflow.
    doubled = policy.backoff_s * 2.0 ** min(failures - 2, 30)
    return min(BACKOFF_CAP_S, doubled) * (1.0 - 0.5 * jitter)


def storage_backoff_s(failures: int, jitter: float) -> float:
    """Returns the wait after failure number `failures` of the storage."""
    doubled = STORAGE_BACKOFF_S * 2.0 ** min(failures - 1, 30)
    return min(BACKOFF_CAP_S, doubled) * (1.0 - 0.5 * jitter)


def _is_crash_loop(commits: tuple[int, ...]) -> bool:
    """Returns whether three failed attempts in a row have committed no later step."""
    if len(commits) < PROGRESS_ATTEMPTS:
        return False
    # With exactly three failures there is no earlier commit: the job began at step 0.
    before = 0
    if len(commits) > PROGRESS_ATTEMPTS:
        before = commits[-PROGRESS_ATTEMPTS - 1]
    return commits[-1] <= before
