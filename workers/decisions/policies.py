"""What to do when something goes wrong.

Owns: root cause, restart, silence and hang decisions. Pure: state in, decision out.

Must not know: Ray, torch, clocks, random numbers (all three come in as values).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from workers.protocol.job import RestartConfig
from workers.protocol.states import StatusReason

SILENCE_S = 15.0
"""A rank that has not answered for so long counts as dead; Ray itself notices a frozen
node after a minute."""
START_SILENCE_S = 90.0
"""The same while processes start: importing torch on a busy machine holds the
interpreter for long."""
HANG_FLOOR_S = 120.0
"""No rank reports anything for max(this, 10 x the longest gap so far): hung."""
FIRST_STEP_S = 1800.0
"""The first report of an attempt may wait for loading and compiling."""
PROGRESS_ATTEMPTS = 3
"""Failed attempts in a row without a higher committed step that end a job."""
BACKOFF_CAP_S = 60.0


class FailureKind(StrEnum):
    """Classes of what ends an attempt; `RANKED` says which one is the cause when
    several are seen together.
    """

    USER = "user"
    OOM = "oom"
    NAN_LOSS = "nan_loss"
    EXCEPTION = "exception"
    STORAGE = "storage"
    PROCESS_DIED = "process_died"
    NODE_LOST = "node_lost"
    NODE_MEMORY = "node_memory"
    PREEMPTED = "preempted"
    SILENT = "silent"
    HANG = "hang"
    START = "start"
    COLLATERAL = "collateral"


RANKED = (
    FailureKind.USER,
    FailureKind.OOM,
    FailureKind.NAN_LOSS,
    FailureKind.EXCEPTION,
    FailureKind.STORAGE,
    FailureKind.PREEMPTED,
    FailureKind.NODE_LOST,
    FailureKind.NODE_MEMORY,
    FailureKind.PROCESS_DIED,
    FailureKind.SILENT,
    FailureKind.START,
    FailureKind.HANG,
    FailureKind.COLLATERAL,
)

_REASONS = {
    FailureKind.USER: StatusReason.SPEC_INVALID,
    FailureKind.OOM: StatusReason.OOM,
    FailureKind.NAN_LOSS: StatusReason.NAN_LOSS,
    FailureKind.STORAGE: StatusReason.STORAGE_ERROR,
    FailureKind.PROCESS_DIED: StatusReason.WORKER_DIED,
    FailureKind.NODE_LOST: StatusReason.NODE_LOST,
    # of the whole node, perhaps another's doing: tried again, unlike a rank's own
    FailureKind.NODE_MEMORY: StatusReason.OOM,
    FailureKind.SILENT: StatusReason.NODE_LOST,
    FailureKind.PREEMPTED: StatusReason.PREEMPTED,
    FailureKind.HANG: StatusReason.HANG,
    FailureKind.EXCEPTION: StatusReason.WORKER_DIED,
    FailureKind.COLLATERAL: StatusReason.WORKER_DIED,
    FailureKind.START: StatusReason.INTERNAL,
}

# Text of errors that a rank gets because another one went away: never the cause when
# any other is known.
_COLLATERAL_TEXTS = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "socket timeout",
    "timed out waiting",
    "remote process exited or there was a network error",
    "nccl communicator was aborted",
    "read error",
    "write error",
)
_USER_TYPES = ("ConfigError", "UnusableDataError", "UserError", "ValidationError")
_OOM_TYPES = ("OutOfMemoryError", "MemoryError")
_STORAGE_TYPES = (
    "StorageError",
    "MissingFileError",
    "AccessDeniedError",
    "InvalidLocationError",
)
_NAN_TYPES = ("NonFiniteLossError",)
_GROUP_TYPES = (
    "DistBackendError",
    "DistNetworkError",
    "DistStoreError",
    "RuntimeError",
    "ConnectionError",
)


@dataclass(frozen=True)
class Failure:
    """One thing that went wrong, as the driver saw it; `order` counts them as they
    arrived.
    """

    kind: FailureKind
    message: str
    rank: int | None = None
    order: int = 0
    detail: str = ""
    """Traceback, for the history; never shown for a user's mistake."""

    @property
    def reason(self) -> StatusReason:
        """The closed word for it."""
        return _REASONS[self.kind]

    def sentence(self) -> str:
        """Message with its rank."""
        return self.message if self.rank is None else f"rank {self.rank}: {self.message}"


def classify(type_name: str, message: str) -> FailureKind:
    """Class of an exception from its type's name and text."""
    text = message.lower()
    if type_name in _USER_TYPES:
        return FailureKind.USER
    if (
        type_name in _OOM_TYPES
        or "out of memory" in text
        or "can't allocate memory" in text
    ):
        return FailureKind.OOM
    if type_name in _NAN_TYPES:
        return FailureKind.NAN_LOSS
    if type_name in _STORAGE_TYPES:
        return FailureKind.STORAGE
    if type_name in _GROUP_TYPES and any(part in text for part in _COLLATERAL_TEXTS):
        return FailureKind.COLLATERAL
    return FailureKind.EXCEPTION


def root_cause(failures: Sequence[Failure]) -> Failure:
    """The failure that explains the others: first by class, then by arrival.

    Raises ValueError when there is none.
    """
    if not failures:
        raise ValueError("no failure to explain")
    return min(failures, key=lambda failure: (RANKED.index(failure.kind), failure.order))


@dataclass(frozen=True)
class RestartHistory:
    """What was spent so far, this failure not included."""

    failures: int = 0
    preemptions: int = 0
    commits_at_failure: tuple[int, ...] = ()


@dataclass(frozen=True)
class RestartDecision:
    """Go on or end, and why."""

    retry: bool
    delay_s: float
    reason: StatusReason
    message: str
    history: RestartHistory
    """What is spent, this failure included."""


def decide_restart(
    policy: RestartConfig,
    history: RestartHistory,
    cause: Failure,
    last_commit: int,
    jitter: float,
) -> RestartDecision:
    """What follows a failed attempt.

    `last_commit`: step of the newest committed checkpoint (0: none); `jitter`: uniform
    in [0, 1).
    """
    said = cause.sentence()
    if cause.kind in (FailureKind.USER, FailureKind.OOM, FailureKind.NAN_LOSS):
        return RestartDecision(
            False,
            0.0,
            cause.reason,
            f"{said} (not tried again: it would only repeat)",
            history,
        )
    if cause.kind is FailureKind.PREEMPTED:
        spent = RestartHistory(
            history.failures, history.preemptions + 1, history.commits_at_failure
        )
        if 0 <= policy.max_preemptions < spent.preemptions:
            text = (
                f"{said} (preempted {spent.preemptions} times, restart.max_preemptions is "
                f"{policy.max_preemptions})"
            )
            return RestartDecision(False, 0.0, StatusReason.BUDGET_SPENT, text, spent)
        return RestartDecision(True, 0.0, cause.reason, said, spent)
    spent = RestartHistory(
        history.failures + 1,
        history.preemptions,
        (*history.commits_at_failure, last_commit),
    )
    if spent.failures > policy.max_failures:
        text = f"{said} (failure {spent.failures}, restart.max_failures is {policy.max_failures})"
        return RestartDecision(
            False,
            0.0,
            StatusReason.BUDGET_SPENT if spent.failures > 1 else cause.reason,
            text,
            spent,
        )
    if _no_progress(spent.commits_at_failure):
        text = (
            f"{said} ({PROGRESS_ATTEMPTS} attempts failed without a checkpoint beyond step "
            f"{last_commit})"
        )
        return RestartDecision(False, 0.0, StatusReason.NO_PROGRESS, text, spent)
    return RestartDecision(
        True, backoff_s(policy, spent.failures, jitter), cause.reason, said, spent
    )


def backoff_s(policy: RestartConfig, failures: int, jitter: float) -> float:
    """Wait before the try that follows failure number `failures`: none after the first,
    then doubling to 60 s, less up to half.
    """
    if failures <= 1:
        return 0.0
    return min(BACKOFF_CAP_S, policy.backoff_s * 2.0 ** min(failures - 2, 30)) * (
        1.0 - 0.5 * jitter
    )


def _no_progress(commits: tuple[int, ...]) -> bool:
    """Whether the last three failed attempts ended no further than the one before them."""
    before = commits[-PROGRESS_ATTEMPTS - 1] if len(commits) > PROGRESS_ATTEMPTS else 0
    return len(commits) >= PROGRESS_ATTEMPTS and commits[-1] <= before


def silent_ranks(
    now: float, heard_at: Mapping[int, float], limit_s: float
) -> tuple[int, ...]:
    """Ranks whose last answer is older than the limit (seconds of the driver's
    monotonic clock).
    """
    return tuple(rank for rank, heard in sorted(heard_at.items()) if now - heard > limit_s)


@dataclass(frozen=True)
class Progress:
    """When anything last advanced, on any rank."""

    last_at: float
    longest_gap_s: float = 0.0
    reports: int = 0

    def advanced(self, now: float) -> "Progress":
        """After a new report; the first one says nothing about gaps, since it waits for
        loading.
        """
        gap = now - self.last_at if self.reports else 0.0
        return Progress(now, max(self.longest_gap_s, gap), self.reports + 1)


def hang(now: float, progress: Progress) -> str | None:
    """A sentence when nothing has advanced for too long, else None."""
    limit = (
        max(HANG_FLOOR_S, 10 * progress.longest_gap_s) if progress.reports else FIRST_STEP_S
    )
    quiet = now - progress.last_at
    return (
        f"no rank reported anything for {quiet:.0f} s (limit {limit:.0f} s)"
        if quiet > limit
        else None
    )


def describe_error(error: Mapping[str, Any]) -> tuple[FailureKind, str]:
    """Class and message of an error that a rank reported ({type, message, user})."""
    kind = (
        FailureKind.USER
        if error.get("user")
        else classify(str(error.get("type", "")), str(error.get("message", "")))
    )
    message = str(error.get("message", ""))
    return (
        kind,
        message if kind is FailureKind.USER else f"{error.get('type', 'error')}: {message}",
    )
