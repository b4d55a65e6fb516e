"""Decides when ranks count as dead or hung.

Owns: the limits of silence and of a lack of progress. Pure: times come in as values.
Must not know: Ray, torch, clocks.
"""

from collections.abc import Mapping
from dataclasses import dataclass

SILENCE_S = 14.5
"""A rank that has not answered for this long counts as dead: it is noticed within 15 s,
the driver's turn included. Ray itself needs a minute to detect a frozen node."""
START_SILENCE_S = 90.0
"""Silence that is tolerated while processes start: importing torch on a busy machine
blocks the interpreter for long."""
HANG_FLOOR_S = 120.0
"""An attempt is hung when no rank reports anything for max(this, 10 x the longest gap so
far), unless the spec has a limit of its own."""
_SET_LIMIT_GAPS = 3
"""Longest gaps between steps below which a limit of the spec is not taken at its word."""
FIRST_STEP_S = 1800.0
"""The first step of an attempt may wait for loading and compiling."""


@dataclass(frozen=True)
class Progress:
    """The last time at which any rank reported progress."""

    last_at: float
    longest_gap_s: float = 0.0
    reports: int = 0
    is_starting: bool = False
    """Whether the first step is still to come."""
    longest_step_gap_s: float = 0.0
    """The longest gap after the first step."""

    def advanced(self, now: float, *, has_stepped: bool = True) -> "Progress":
        """Returns the progress after a new report of a rank that has done a step or not."""
        gap = 0.0
        # The first report waits for loading and compiling, so its gap is not a pace.
        if self.reports:
            gap = now - self.last_at
        step_gap = self.longest_step_gap_s
        if not self.is_starting:
            step_gap = max(step_gap, gap)
        return Progress(
            now,
            max(self.longest_gap_s, gap),
            self.reports + 1,
            self.is_starting and not has_stepped,
            step_gap,
        )


def silence_limit_s(*, has_stepped: bool) -> float:
    """Returns how long a rank may stay silent, before and after the first step."""
    if has_stepped:
        return SILENCE_S
    return START_SILENCE_S


def silent_ranks(
    now: float, answered_at: Mapping[int, float], limit_s: float
) -> tuple[int, ...]:
    """Returns the ranks whose last answer is older than the limit, in order.

    `answered_at` and `now` are seconds of the driver's monotonic clock.
    """
    silent = []
    for rank, at in sorted(answered_at.items()):
        if now - at > limit_s:
            silent.append(rank)
    return tuple(silent)


def silent_with_nodes(
    now: float,
    answered_at: Mapping[int, float],
    node_of: Mapping[int, str],
    limit_s: float,
) -> tuple[int, ...]:
    """Returns the silent ranks, and those of their nodes that fell silent with them.

    Ranks answer at different times, so those of a frozen node reach the limit one by one.
    `node_of` holds each rank's node.
    """
    silent = silent_ranks(now, answered_at, limit_s)
    nodes = {node_of[rank] for rank in silent}
    of_nodes = []
    for rank in silent_ranks(now, answered_at, limit_s / 2):
        if rank in silent or node_of[rank] in nodes:
            of_nodes.append(rank)
    return tuple(of_nodes)


def hang_limit_s(progress: Progress, timeout_s: float | None = None) -> float:
    """Returns how long nothing may advance; `timeout_s` is the limit of the spec, if any."""
    if not progress.reports or progress.is_starting:
        return max(FIRST_STEP_S, timeout_s or 0.0)
    # The limit follows the job's own pace: a report may be minutes apart, or milliseconds.
    if timeout_s is not None:
        return max(timeout_s, _SET_LIMIT_GAPS * progress.longest_step_gap_s)
    return max(HANG_FLOOR_S, 10 * progress.longest_gap_s)


def hang(now: float, progress: Progress, timeout_s: float | None = None) -> str | None:
    """Returns a sentence when nothing has advanced for too long, else None."""
    limit = hang_limit_s(progress, timeout_s)
    silence_s = now - progress.last_at
    if silence_s <= limit:
        return None
    return f"no rank reported anything for {silence_s:.0f} s (limit {limit:.0f} s)"
