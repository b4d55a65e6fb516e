"""Defines what a job's driver observes; `job_phases` decides what follows.

Pure values. Must not know: Ray, torch, HTTP.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workers.decisions.failures import Failure
from workers.decisions.faults.rollbacks import RollbackPlan
from workers.decisions.peers.copies import CopySet
from workers.decisions.restart_policy import RestartDecision
from workers.protocol.states import DesiredState, StatusReason


@dataclass(frozen=True)
class DataPrepared:
    """The data task is done; `prepared` is PreparedData as JSON."""

    prepared: Mapping[str, Any]


@dataclass(frozen=True)
class DataRejected:
    """The data cannot be used; the problems are already recorded in the service."""

    message: str


@dataclass(frozen=True)
class PreparationFailed:
    """The data task failed for a reason that is not the user's."""

    message: str
    reason: StatusReason = StatusReason.INTERNAL


@dataclass(frozen=True)
class RunRequested:
    """The service has admitted the job."""


@dataclass(frozen=True)
class StopRequested:
    """The job is to be cancelled or paused while no attempt runs."""

    desired: DesiredState
    revision: int


@dataclass(frozen=True)
class ResumeRequested:
    """The user has resumed the job after its end."""

    resumes: int
    """Number of the request."""
    spec: Mapping[str, Any]
    """Resolved spec of the job from now on, as JSON."""
    revision: int
    has_other_data: bool = False
    """Whether its data are other ones than those that are prepared."""


@dataclass(frozen=True)
class Placed:
    """The placement group is ready; the next attempt can start."""

    code_version: str
    checkpoint_path: str | None
    """Newest committed checkpoint; None: from the beginning."""
    checkpoint_step: int = 0
    copies: CopySet | None = None
    """Copies in the ranks' memory that are as new as the checkpoint or newer."""
    dp: int | None = None
    """Data-parallel size of a shrunk attempt; None: that of the spec."""


@dataclass(frozen=True)
class NothingToResume:
    """Checkpoints were committed, and none of them can be loaded any more."""

    message: str


@dataclass(frozen=True)
class PlacementTimedOut:
    """The placement group did not become ready in time."""

    message: str
    revision: int


@dataclass(frozen=True)
class RanksStarted:
    """Every rank runs its training thread."""


@dataclass(frozen=True)
class AttemptAbandoned:
    """A restarted driver has ended ranks whose start its predecessor did not finish."""


@dataclass(frozen=True)
class AttemptFinished:
    """Every rank has completed its last step, and all checkpoints are committed."""


@dataclass(frozen=True)
class AttemptExited:
    """Every rank has ended at a limit of the spec, and all checkpoints are committed."""


@dataclass(frozen=True)
class AttemptStopped:
    """The ranks stopped, or the grace period ran out; `desired` is the state to reach."""

    desired: DesiredState
    revision: int
    message: str = ""


@dataclass(frozen=True)
class AttemptFailed:
    """The attempt failed, while starting or running."""

    cause: Failure
    dead_ranks: tuple[int, ...] = ()
    """Ranks whose process has died or must be ended."""


@dataclass(frozen=True)
class RestartDecided:
    """The failure is recorded, and the restart policy has decided."""

    decision: RestartDecision
    rollback: RollbackPlan | None = None
    """After a rollback that was recorded in storage."""


Observation = (
    DataPrepared
    | DataRejected
    | PreparationFailed
    | RunRequested
    | StopRequested
    | ResumeRequested
    | Placed
    | NothingToResume
    | PlacementTimedOut
    | RanksStarted
    | AttemptAbandoned
    | AttemptFinished
    | AttemptExited
    | AttemptStopped
    | AttemptFailed
    | RestartDecided
)
