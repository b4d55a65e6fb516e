"""Decides how long to wait before an exited process is restarted.

Pure. Must not know: processes, clocks.
"""

from dataclasses import dataclass

PROVEN_S = 2.0
"""Seconds of readiness after which a process counts as working."""
_MIN_SECONDS_BETWEEN_STARTS = (0.0, 0.0, 1.0, 2.0, 5.0, 10.0, 30.0)


@dataclass(frozen=True)
class Restart:
    """When to restart a process that has exited."""

    wait_s: float
    """Seconds from the exit to the next start."""
    crashes: int
    """Consecutive exits of processes that never counted as working, including this one."""


def after_end(crashes: int, lived_s: float, ready_s: float | None) -> Restart:
    """Returns when to restart a process that lived for `lived_s` seconds.

    `crashes` counts the crashes before this exit; `ready_s` is how long the process was
    ready, None when it never was.
    """
    # A process that worked is restarted at once, however often it is killed: its exit
    # is no evidence against the next start.
    if ready_s is not None and ready_s >= PROVEN_S:
        return Restart(wait_s=0.0, crashes=0)
    # The table holds distances between starts, so a long life shortens the wait.
    index = min(crashes, len(_MIN_SECONDS_BETWEEN_STARTS) - 1)
    interval_s = _MIN_SECONDS_BETWEEN_STARTS[index]
    return Restart(wait_s=max(0.0, interval_s - lived_s), crashes=crashes + 1)
