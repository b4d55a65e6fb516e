"""Defines the parameters of one attempt and the interface of its listener.

Owns: these values only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from workers.decisions.faults.drains import Drain
from workers.decisions.placement import RankPlace
from workers.decisions.preflight.judgement import Limits
from workers.decisions.preflight.verdict import Verdict
from workers.decisions.ranks.stragglers import SlowRank
from workers.driver.commit import WholeCheckpoint, source_of
from workers.protocol.states import DesiredState
from workers.rank.messages import Fence


@dataclass(frozen=True)
class AttemptPlan:
    """The parameters with which an attempt was started."""

    attempt: int
    epoch: int
    places: tuple[RankPlace, ...]
    storage_path: str
    keep_last: int
    grace_s: float
    manifest: dict[str, Any]
    last_commit: int
    """Step from which the attempt started."""
    checkpoint_requests: int = 0
    """Number of checkpoint requests that were passed on to the ranks before."""
    diagnosis_requests: int = 0
    """Number of diagnosis requests that were carried out before."""
    preflight: Limits | None = None
    """What counts as bad in the measurements before training; None: there are none."""
    hang_timeout_s: float | None = None
    """Limit of the spec for a time without any report."""
    slow_ranks: tuple[SlowRank, ...] = ()
    """Ranks that an earlier incarnation has reported as slow."""
    stopping: DesiredState | None = None
    """Why an earlier incarnation sent the ranks a stop command."""
    renew: bool = False
    """Whether to stop at a checkpoint, because another code version started the
    ranks."""

    @property
    def fence(self) -> Fence:
        """Attempt and epoch, by which ranks recognize their driver."""
        return Fence(self.attempt, self.epoch)

    @property
    def source(self) -> str:
        """Name under which rank 0's records are numbered."""
        return source_of(self.attempt)


class AttemptListener(Protocol):
    """Receives the events of an attempt, in the driver's thread."""

    def stepped(self, data: dict[str, Any]) -> None:
        """Rank 0 has done a step."""

    def phase(self, data: dict[str, Any]) -> None:
        """Rank 0 has finished a phase of its start."""

    def committed(self, whole: WholeCheckpoint, deleted: Sequence[str]) -> None:
        """A checkpoint is committed, and others are deleted."""

    def stop_requested(self, desired: DesiredState) -> None:
        """The ranks are about to get a stop command."""

    def draining(self, drain: Drain) -> None:
        """The ranks are about to get a stop command, because nodes of theirs go."""

    def storage_slow(self, message: str) -> None:
        """A checkpoint takes longer than it should."""

    def save_failed(self, rank: int, data: dict[str, Any]) -> None:
        """A rank other than 0 could not write its part of a checkpoint."""

    def commit_delayed(self, message: str) -> None:
        """A checkpoint is not committed yet, because the storage has refused it."""

    def resize_reason(self) -> str | None:
        """Returns why the ranks are to stop and go on at another size, if they are."""

    def checkpoint_requested(self, checkpoint_requests: int) -> None:
        """The ranks got checkpoint commands, `checkpoint_requests` in all."""

    def preflight(self, verdict: Verdict) -> None:
        """The nodes were measured."""

    def persistent_fault(self) -> None:
        """A step that was computed wrongly before is good on the nodes of this attempt."""

    def slow(self, slow: SlowRank, place: RankPlace) -> None:
        """A rank's own work has become slow."""

    def recovered(self, slow: SlowRank, place: RankPlace) -> None:
        """A slow rank is as fast as its peers again."""

    def profiled(self, report: dict[str, Any]) -> None:
        """A rank has written a profile, or cannot; see ProfileReport."""

    def diagnosed(self, report: dict[str, Any], diagnosis_requests: int) -> None:
        """The ranks were examined; `diagnosis_requests` are carried out in all."""
