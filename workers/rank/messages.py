"""Defines the messages between a driver and its rank workers.

Owns: these messages as plain values. Must not know: Ray, torch, HTTP.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from megatron_ray.exceptions import InputError
from workers.decisions.preflight.orders import PreflightOrder
from workers.decisions.ranks.stragglers import Pace
from workers.exceptions import WorkersError
from workers.rank.environment import RankEnv
from workers.rank.spool import Line


class RankState(StrEnum):
    """State of the training thread inside a worker."""

    IDLE = "idle"
    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"
    EXITED = "exited"
    """The ranks have agreed to end at a limit of the spec, before the last step."""
    FAILED = "failed"

    @property
    def is_over(self) -> bool:
        """Whether the attempt has ended on this rank."""
        return self not in (RankState.IDLE, RankState.RUNNING)


class UserError(InputError):
    """A user's input cannot be used; the message names it and the remedy.

    Never retried, never shown with a traceback.
    """


class FencedError(WorkersError):
    """The caller's (attempt, epoch) is lower than one already seen.

    A newer driver has replaced the caller, which must end.
    """


class BusyError(WorkersError):
    """The training thread of another attempt is still alive, so none can be started."""


@dataclass(frozen=True)
class Fence:
    """Identifies a caller: the attempt, and the driver's incarnation."""

    attempt: int
    epoch: int


@dataclass(frozen=True)
class CopySource:
    """Where a rank finds the copy of its state that it is to continue from."""

    attempt: int
    step: int
    holder: int
    """Rank of this attempt in whose process it is."""


@dataclass(frozen=True)
class RecheckOrder:
    """A step that may have been computed wrongly, and is computed on other devices."""

    step: int | None = None
    """None: there is none, but the run may be restarted for one."""
    rank: int = 0
    """Rank there that may have computed it wrongly."""
    has_moved: bool = False
    """Whether no rank is on that rank's node any more."""


@dataclass(frozen=True)
class StartRequest:
    """All parameters of one attempt on one rank, as plain values."""

    env: RankEnv
    spec: dict[str, Any]
    """Resolved JobSpec as JSON."""
    data: dict[str, Any]
    """PreparedData as JSON."""
    attempt: int
    device: str
    """`cpu` or `cuda`."""
    device_index: int = 0
    gpu: int | None = None
    """Index on the node of the GPU to use, for a process to which Ray assigned none."""
    store: tuple[str, int] | None = None
    """Host and port of the TCPStore; None: those in the environment."""
    resume_from: str | None = None
    """Path of the committed checkpoint to resume from; None: start at step 0."""
    left_out: tuple[int, ...] = ()
    """Steps whose samples are left out beside those of training.skip_steps."""
    recheck: RecheckOrder | None = None
    """Under a driver, the step that other devices have rejected; None: no driver."""
    partner: int | None = None
    """Rank that keeps copies of this rank's state too; None: no copies are made."""
    copy: CopySource | None = None
    """Copy to continue from; when any rank cannot load its own, `resume_from` counts."""
    preflight: PreflightOrder | None = None
    """What to measure before training; None: nothing."""
    timeout_s: float = 600.0
    """Timeout of the store, in seconds."""


@dataclass(frozen=True)
class Poll:
    """Arguments of one call of `RankWorker.next`."""

    after: int | None
    """Number of the last report received; None: start after the last released one."""
    released: int = 0
    """Reports up to this number are stored elsewhere: their file may be deleted."""
    wait_s: float = 2.0
    """Longest wait for a new report, in seconds."""
    steps: bool = True
    """Whether to return step and eval reports, needed from rank 0 only; all others are
    always returned."""
    stored: int = 0
    """Reports up to this number are stored in the service."""
    log_offset: int = 0
    """Offset of the first log byte not received yet."""
    log_bytes: int = 0
    """Maximum number of log bytes in the reply."""


@dataclass(frozen=True)
class NextReply:
    """Reports, log bytes and state of a rank, in reply to a poll."""

    state: RankState
    attempt: int
    last_n: int
    """Number of the last report read: `after` of the next poll."""
    lines: list[Line] = field(default_factory=list)
    step: int = 0
    reports: int = 0
    """Number of reports written in this attempt, including those not returned; a rank
    makes progress while it grows."""
    pace: Pace = field(default_factory=Pace)
    """Steps of this attempt and their seconds, its own ones apart."""
    error: dict[str, Any] | None = None
    """{type, message, failure_kind, traceback, step} of a failed rank."""
    log_offset: int = 0
    """Offset of the first byte of `log`."""
    log: bytes = b""
