"""Decides when a checkpoint that is being written or committed takes too long.

Owns: the limits. Pure: times come in as values. Must not know: Ray, torch, clocks,
storage.
"""

from collections.abc import Sequence
from dataclasses import dataclass

SLOW_S = 60.0
"""Seconds after the first rank's part until all others are expected."""
SLOW_COMMIT_S = 30.0
"""Seconds within which a commit, a few small files, is expected."""
_MAX_NAMED = 8


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint that is not committed yet."""

    step: int
    since: float
    """When its first part was durable, or when its commit began."""
    missing: Sequence[int] = ()
    """Ranks that have not written their part; none while it is being committed."""


def slow_storage(open_checkpoint: OpenCheckpoint, now: float) -> str | None:
    """Returns a sentence when a checkpoint takes too long; None otherwise."""
    waited_s = now - open_checkpoint.since
    step = open_checkpoint.step
    if not open_checkpoint.missing:
        if waited_s < SLOW_COMMIT_S:
            return None
        return (
            f"the storage is slow: committing the checkpoint of step {step} has taken "
            f"{waited_s:.0f} s so far"
        )
    if waited_s < SLOW_S:
        return None
    ranks = ", ".join(str(rank) for rank in open_checkpoint.missing[:_MAX_NAMED])
    if len(open_checkpoint.missing) > _MAX_NAMED:
        ranks = f"{ranks} and {len(open_checkpoint.missing) - _MAX_NAMED} more"
    return (
        f"the storage is slow: {waited_s:.0f} s after other ranks, these have not written "
        f"their part of the checkpoint of step {step}: {ranks}"
    )
