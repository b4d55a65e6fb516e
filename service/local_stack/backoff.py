"""When a process that ended is started again.

Pure. Must not know: processes, clocks.
"""

from dataclasses import dataclass

PROVEN_S = 2.0
"""A process that was ready for so long works: its end is no fault of its start."""
_BETWEEN_STARTS_S = (0.0, 0.0, 1.0, 2.0, 5.0, 10.0, 30.0)


@dataclass(frozen=True)
class Restart:
    """What to do about an end."""

    wait_s: float
    """From the end to the next start."""
    crashes: int
    """Ends in a row, this one included, of processes that had not proven to work."""


def after_end(crashes: int, lived_s: float, ready_s: float | None) -> Restart:
    """`crashes` before this end; `ready_s` is how long the process had been ready, None
    when it never was.

    One that worked is started again at once, however often it is killed. Starts of one
    that does not work move apart.
    """
    if ready_s is not None and ready_s >= PROVEN_S:
        return Restart(wait_s=0.0, crashes=0)
    between_s = _BETWEEN_STARTS_S[min(crashes, len(_BETWEEN_STARTS_S) - 1)]
    return Restart(wait_s=max(0.0, between_s - lived_s), crashes=crashes + 1)
