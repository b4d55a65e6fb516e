"""Decides which command the ranks of a running attempt get, and whether it is over.

Pure. Must not know: clocks, Ray, how observations and commands are transported.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from megatron_ray.commands import Command
from workers.decisions.failures import Failure, FailureKind, root_cause
from workers.decisions.observations import (
    AttemptExited,
    AttemptFailed,
    AttemptFinished,
)
from workers.driver.attempt.plan import AttemptPlan
from workers.protocol.states import DesiredState
from workers.protocol.wire import DesiredJob
from workers.rank.messages import RankState

STOPPING = (DesiredState.CANCEL, DesiredState.PAUSE)


@dataclass(frozen=True)
class RanksStopped:
    """The ranks stopped on command, or the grace period ran out (`forced`)."""

    forced: bool = False
    resize_reason: str | None = None
    """Why the job goes on at another size; None: it does not."""


@dataclass(frozen=True)
class StopDecision:
    """The ranks are to stop."""

    command: Command
    stopping: DesiredState | None
    """Reason of the stop to journal; None: already journaled, or not needed."""


def decide_stop(
    plan: AttemptPlan, desired: DesiredJob | None, *, resizes: bool = False
) -> StopDecision | None:
    """Returns how ranks without a stop command are to stop; None: they continue.

    `desired` is None until the service has been reached; until then an earlier
    incarnation's stop applies. `resizes`: the job is to go on at another size.
    """
    # Adopted ranks get the earlier incarnation's stop command again: it may not have
    # been sent, and a second one changes nothing.
    state = plan.stopping
    if desired is not None:
        state = desired.desired
    is_stopping = state in STOPPING
    if not is_stopping and not plan.renew and not resizes:
        return None
    # Ranks that stop for a new version or another size always save, because they resume
    # from that checkpoint.
    saves = not is_stopping or desired is None or desired.final_checkpoint
    command = Command.STOP
    if saves:
        command = Command.CHECKPOINT_AND_STOP
    stopping = None
    if is_stopping and state is not plan.stopping:
        stopping = state
    return StopDecision(command, stopping)


def attempt_end(
    states: Collection[RankState],
) -> AttemptFinished | AttemptExited | RanksStopped | None:
    """Returns how an attempt without a failure has ended; None while it runs."""
    if not is_over(states):
        return None
    # The ranks agree on the step after which they stop, so either all of them have
    # completed the last step or none has.
    if set(states) == {RankState.FINISHED}:
        return AttemptFinished()
    if set(states) == {RankState.EXITED}:
        return AttemptExited()
    return RanksStopped()


def is_over(states: Collection[RankState]) -> bool:
    """Whether the attempt has ended on every rank."""
    return all(state.is_over for state in states)


def attempt_failure(
    failures: Sequence[Failure], dead: Collection[int], ranks: Collection[int]
) -> AttemptFailed:
    """Returns the root cause, and the ranks whose process has died or must be ended.

    Raises ValueError when there is no failure.
    """
    cause = root_cause(failures)
    # A hung rank cannot leave its collectives, so its process cannot be reused.
    if cause.kind is FailureKind.HANG:
        dead = ranks
    return AttemptFailed(cause, tuple(sorted(dead)))
