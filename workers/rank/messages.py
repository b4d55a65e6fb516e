"""What a driver tells its workers and what they answer.

Owns: plain values on that path. Must not know: Ray, torch, HTTP.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from megatron_ray.exceptions import InputError
from workers.exceptions import WorkersError
from workers.rank.environment import RankEnv
from workers.rank.spool import Line


class RankState(StrEnum):
    """Life of the training thread inside a worker."""

    IDLE = "idle"
    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"

    @property
    def is_over(self) -> bool:
        """Whether the attempt has ended on this rank."""
        return self in (RankState.FINISHED, RankState.STOPPED, RankState.FAILED)


class UserError(InputError):
    """Something the user wrote cannot work; the text says what and how to mend it.

    Never retried, never shown with a traceback.
    """


class FencedError(WorkersError):
    """A caller with an (attempt, epoch) lower than one already seen; it has been
    replaced and must end.
    """


class BusyError(WorkersError):
    """A start order while the training thread of another attempt is still alive."""


@dataclass(frozen=True)
class Fence:
    """Who is speaking: the attempt, and the incarnation of the driver."""

    attempt: int
    epoch: int


@dataclass(frozen=True)
class StartOrder:
    """Everything one rank needs for one attempt; plain values."""

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
    """Index on the node, for a process that Ray has not given one."""
    store: tuple[str, int] | None = None
    """Host and port of the TCPStore; None: the rendezvous that the environment
    names."""
    resume_from: str | None = None
    """Path of a committed checkpoint."""
    timeout_s: float = 600.0
    """Patience of collectives."""


@dataclass(frozen=True)
class Poll:
    """One call of `next`: what the driver has, and how much more it wants."""

    after: int | None
    """Highest report number in hand; None: begin after the last released one."""
    released: int = 0
    """Reports up to here are stored elsewhere: their file may go."""
    wait_s: float = 2.0
    steps: bool = True
    """Whether step and eval reports are wanted (of rank 0 only); the others are
    always."""
    log_offset: int = 0
    log_bytes: int = 0
    """Budget for log bytes in this answer."""


@dataclass(frozen=True)
class NextReply:
    """Reports, log bytes and liveness in one."""

    state: RankState
    attempt: int
    last_n: int
    """Cursor for the next call."""
    lines: list[Line] = field(default_factory=list)
    step: int = 0
    reports: int = 0
    """Reports written in this attempt, filtered ones included: the sign of progress."""
    error: dict[str, Any] | None = None
    """{type, message, failure_kind, traceback, step} once failed."""
    log_offset: int = 0
    log: bytes = b""
