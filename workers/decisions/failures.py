"""Classifies the failures of an attempt and picks the root cause.

Owns: the kinds of failures, their precedence, how a rank's error is classified. Pure.
Must not know: what follows a failure, Ray, torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from megatron_ray.exceptions import ErrorKind
from workers.decisions.faults import gpu_errors
from workers.protocol.states import StatusReason


class FailureKind(StrEnum):
    """Kinds of failures that end an attempt; journals store them by value."""

    USER = "user"
    OOM = "oom"
    NAN_LOSS = "nan_loss"
    RULE = "rule"
    """A rule of training.rules ends the job."""
    ROLLBACK = "rollback"
    """A rule of training.rules has the next attempt go on from an earlier state."""
    RECHECK = "recheck"
    """A step may have been computed wrongly; the next attempt computes it elsewhere."""
    EXCEPTION = "exception"
    STORAGE = "storage"
    DISK_FULL = "disk_full"
    CHECKPOINT = "checkpoint"
    """The checkpoint that the attempt resumed from is damaged; the next attempt resumes
    from an older one."""
    PROCESS_DIED = "process_died"
    NODE_LOST = "node_lost"
    GPU = "gpu"
    """A GPU or its driver is defective; the next attempt avoids the node."""
    NODE_MEMORY = "node_memory"
    """The whole node ran out of memory, perhaps because of another job; retried, unlike
    a rank's own OOM."""
    PREEMPTED = "preempted"
    SILENT = "silent"
    PREFLIGHT = "preflight"
    """Nodes are slow or wrong, as measured before training; the next attempt avoids them."""
    HANG = "hang"
    START = "start"
    COLLATERAL = "collateral"
    """A rank's error after a peer disconnected; the root cause only when no other
    failure is known."""


BY_PRECEDENCE = (
    FailureKind.USER,
    FailureKind.OOM,
    FailureKind.NAN_LOSS,
    FailureKind.RULE,
    FailureKind.ROLLBACK,
    FailureKind.RECHECK,
    FailureKind.GPU,
    FailureKind.EXCEPTION,
    FailureKind.CHECKPOINT,
    FailureKind.DISK_FULL,
    FailureKind.STORAGE,
    FailureKind.PREEMPTED,
    FailureKind.NODE_LOST,
    FailureKind.NODE_MEMORY,
    FailureKind.PROCESS_DIED,
    FailureKind.SILENT,
    FailureKind.START,
    FailureKind.PREFLIGHT,
    FailureKind.HANG,
    FailureKind.COLLATERAL,
)
"""Kinds by precedence: the first of several simultaneous failures is the root cause."""

_REASONS = {
    FailureKind.USER: StatusReason.SPEC_INVALID,
    FailureKind.OOM: StatusReason.OOM,
    FailureKind.NAN_LOSS: StatusReason.NAN_LOSS,
    FailureKind.RULE: StatusReason.TRAINING_RULE,
    FailureKind.ROLLBACK: StatusReason.TRAINING_RULE,
    FailureKind.RECHECK: StatusReason.TRAINING_RULE,
    FailureKind.STORAGE: StatusReason.STORAGE_ERROR,
    FailureKind.DISK_FULL: StatusReason.STORAGE_ERROR,
    FailureKind.CHECKPOINT: StatusReason.STORAGE_ERROR,
    FailureKind.PROCESS_DIED: StatusReason.WORKER_DIED,
    FailureKind.NODE_LOST: StatusReason.NODE_LOST,
    FailureKind.NODE_MEMORY: StatusReason.OOM,
    FailureKind.GPU: StatusReason.GPU_ERROR,
    FailureKind.SILENT: StatusReason.NODE_LOST,
    FailureKind.PREEMPTED: StatusReason.PREEMPTED,
    FailureKind.PREFLIGHT: StatusReason.BAD_NODES,
    FailureKind.HANG: StatusReason.HANG,
    FailureKind.EXCEPTION: StatusReason.WORKER_DIED,
    FailureKind.COLLATERAL: StatusReason.WORKER_DIED,
    FailureKind.START: StatusReason.INTERNAL,
}

_KIND_OF_ERROR: dict[str, FailureKind] = {
    ErrorKind.USER: FailureKind.USER,
    ErrorKind.STORAGE: FailureKind.STORAGE,
    ErrorKind.DISK_FULL: FailureKind.DISK_FULL,
    ErrorKind.CHECKPOINT: FailureKind.CHECKPOINT,
    ErrorKind.NUMERICS: FailureKind.NAN_LOSS,
    ErrorKind.RULE: FailureKind.RULE,
    ErrorKind.ROLLBACK: FailureKind.ROLLBACK,
    ErrorKind.RECHECK: FailureKind.RECHECK,
    ErrorKind.HARDWARE: FailureKind.GPU,
    ErrorKind.REPLICAS: FailureKind.EXCEPTION,
    ErrorKind.MEMORY: FailureKind.OOM,
}

FOREIGN_TYPES = {
    "ValidationError": FailureKind.USER,  # pydantic
    "OutOfMemoryError": FailureKind.OOM,  # torch
    "MemoryError": FailureKind.OOM,
}
"""Exceptions of other libraries, which carry no failure kind, by class name."""
LEGACY_TYPES = {
    "ConfigProblem": FailureKind.USER,
    "ConfigError": FailureKind.USER,
    "DataProblem": FailureKind.USER,
    "UnusableDataError": FailureKind.USER,
    "UserMistake": FailureKind.USER,
    "UserError": FailureKind.USER,
    "NonFiniteLoss": FailureKind.NAN_LOSS,
    "NonFiniteLossError": FailureKind.NAN_LOSS,
    "StorageError": FailureKind.STORAGE,
    "MissingFile": FailureKind.STORAGE,
    "MissingFileError": FailureKind.STORAGE,
}
"""The project's exceptions in records of versions that did not report the kind."""
GROUP_TYPES = (
    "DistBackendError",
    "DistNetworkError",
    "DistStoreError",
    "RuntimeError",
    "ConnectionError",
)
"""Exceptions that torch.distributed raises when a peer disconnects."""
# Texts of gloo and NCCL, in exceptions of GROUP_TYPES.
_PEER_LOST_TEXTS = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "socket timeout",
    "timed out waiting",
    "remote process exited or there was a network error",
    "network error or a remote process exiting",
    "unhandled system error",
    "connection was likely closed",
    "watchdog caught collective operation timeout",
    "nccl communicator was aborted",
    "read error",
    "write error",
)
_OOM_TEXTS = ("out of memory", "can't allocate memory")
_DISK_FULL_TEXTS = ("no space left on device", "disk quota exceeded", "the disk is full")
_STORAGE_TEXTS = (
    "input/output error",
    "remote i/o error",
    "stale file handle",
    "transport endpoint is not connected",
    "read-only file system",
)
"""Texts of the operating system about a file system that does not work."""
_ADVICE = (
    "CUDA kernel errors might be asynchronously",
    "For debugging consider passing",
    "Compile with `TORCH_USE_CUDA_DSA`",
    "Device-side assertion tracking was not enabled",
    "Search for `cuda",
)
"""Lines that torch adds to every error of CUDA."""
_TRACE = ("Exception raised from ", "C++ CapturedTraceback:")
"""Lines after which torch adds frames of C++."""
_ASSERT_TEXT = "device-side assert triggered"


_COMPLETE_MESSAGES = (
    FailureKind.USER,
    FailureKind.RULE,
    FailureKind.ROLLBACK,
    FailureKind.RECHECK,
    FailureKind.DISK_FULL,
    FailureKind.CHECKPOINT,
)
"""Kinds with messages of the project's own."""


@dataclass(frozen=True)
class Failure:
    """One failure, as the driver observed it."""

    kind: FailureKind
    message: str
    rank: int | None = None
    order: int = 0
    """Index of the failure within its attempt, in order of arrival."""
    detail: str = ""
    """Traceback for the history; not shown for a user's error."""
    step: int | None = None
    """Last step that the rank had done; None where that is not known."""
    facts: Mapping[str, int] = field(default_factory=dict)
    """Numbers by which the next attempt starts, after ROLLBACK and RECHECK."""

    @property
    def reason(self) -> StatusReason:
        """Returns the status reason that clients see."""
        return _REASONS[self.kind]

    def sentence(self) -> str:
        """Returns the message, with its rank where there is one."""
        if self.rank is None:
            return self.message
        return f"rank {self.rank}: {self.message}"


def describe_error(error: Mapping[str, Any]) -> tuple[FailureKind, str]:
    """Returns class and message of an error that a rank reported.

    `error` holds type, message and failure_kind; the last is absent for exceptions of
    other libraries and in records of older versions.
    """
    type_name = str(error.get("type", ""))
    message = str(error.get("message", ""))
    kind = classify(type_name, message, error.get("failure_kind"))
    # These messages are complete without the class name.
    is_explained = error.get("failure_kind") == ErrorKind.MEMORY
    if is_explained or kind in _COMPLETE_MESSAGES:
        return kind, message
    sentence = f"{type_name or 'error'}: {_without_advice(message)}"
    if _ASSERT_TEXT in message:
        sentence += (
            " (a kernel refused its input, such as an index out of range: a bug, not a "
            "defect of the GPU)"
        )
    return kind, sentence


def _without_advice(message: str) -> str:
    """Returns a message in one line, without torch's advice and C++ frames."""
    lines = []
    for line in message.splitlines():
        if line.startswith(_TRACE):
            break
        if line.strip() and not line.startswith(_ADVICE):
            lines.append(line.strip())
    return " ".join(lines)


def classify(type_name: str, message: str, failure_kind: str | None = None) -> FailureKind:
    """Returns an exception's kind: its own, else one derived from type and text."""
    # The project's exceptions carry their kind; if that is INTERNAL, the text decides.
    own_kind = _KIND_OF_ERROR.get(failure_kind or "")
    if own_kind is not None:
        return own_kind
    known = FOREIGN_TYPES.get(type_name) or LEGACY_TYPES.get(type_name)
    if known is FailureKind.USER:
        return known
    text = message.lower()
    # torch raises plain RuntimeErrors for the host's memory, so the text counts too.
    if _contains_any(text, _OOM_TEXTS):
        return FailureKind.OOM
    if known is not None:
        return known
    if gpu_errors.is_defect(text):
        return FailureKind.GPU
    # An OSError of a file that is not the library's.
    if _contains_any(text, _DISK_FULL_TEXTS):
        return FailureKind.DISK_FULL
    if _contains_any(text, _STORAGE_TEXTS):
        return FailureKind.STORAGE
    # With another type, such a text does not mean that a peer is the cause.
    if type_name in GROUP_TYPES and _contains_any(text, _PEER_LOST_TEXTS):
        return FailureKind.COLLATERAL
    return FailureKind.EXCEPTION


def root_cause(failures: Sequence[Failure]) -> Failure:
    """Returns the failure that explains the others: first by kind, then by arrival.

    Raises ValueError when there is none.
    """
    if not failures:
        raise ValueError("no failure to explain")
    return min(failures, key=_precedence)


def _precedence(failure: Failure) -> tuple[int, int]:
    return BY_PRECEDENCE.index(failure.kind), failure.order


def _contains_any(text: str, parts: Sequence[str]) -> bool:
    return any(part in text for part in parts)
