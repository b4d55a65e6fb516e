"""Turns a diagnosis and its evidence into the report that is stored and shown.

Owns: the report's fields, and its bounds: a job may have thousands of ranks. Pure. Must
not know: Ray, torch, readers of the report.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workers.decisions.placement import RankPlace
from workers.decisions.ranks.diagnosis import (
    Diagnosis,
    Evidence,
    RankEvidence,
    stacks_by_ranks,
)

MAX_RANKS = 64
"""Ranks that a report lists one by one: the culprits, then by number."""
MAX_STACKS = 12
"""Different stacks in a report; those of single ranks come first."""


@dataclass(frozen=True)
class Examined:
    """All ranks of an attempt at one moment."""

    diagnosis: Diagnosis
    report: dict[str, Any]
    """JSON; see `report_of`."""
    waits_for_storage: bool = False
    """Whether the storage is what they wait for."""

    @property
    def culprit(self) -> int | None:
        """The rank that all others wait for; None when it is not one alone."""
        if len(self.diagnosis.culprits) == 1:
            return self.diagnosis.culprits[0]
        return None

    def describe_hang(self, message: str) -> str:
        """Returns the failure's sentence; `message` names the time and the limit.

        Without the rank at its beginning when it is that of one, which a failure names.
        """
        reason = self.diagnosis.reason
        if self.culprit is not None:
            reason = reason.removeprefix(f"rank {self.culprit} ")
        return f"{reason}; {message}"

    def describe_stall(self, quiet_s: float) -> str:
        """Returns the event's sentence about ranks that wait for the storage."""
        return (
            f"the storage does not answer: no rank has reported anything for {quiet_s:.0f} s, "
            f"and no rank is ended for it yet; {self.diagnosis.reason}"
        )


def report_of(
    diagnosis: Diagnosis,
    evidence: Evidence,
    places: Sequence[RankPlace],
    outside_stacks: Mapping[int, str],
    *,
    quiet_s: float,
    is_hang: bool,
) -> dict[str, Any]:
    """Returns the report as JSON.

    `outside_stacks` are those of ranks that do not answer, by rank. It holds functions
    and lines, and no values of variables.
    """
    place_of = {place.rank: place for place in places}
    # The culprits come first, then the others by number.
    listed = tuple(dict.fromkeys((*diagnosis.culprits, *sorted(evidence))))[:MAX_RANKS]
    rows = []
    culprits = []
    for rank in listed:
        rows.append(_row(place_of[rank], evidence[rank]))
        if rank in diagnosis.culprits:
            culprits.append(_where(place_of[rank]))
    trigger = "request"
    if is_hang:
        trigger = "hang"
    return {
        "trigger": trigger,
        "reason": diagnosis.reason,
        "confidence": diagnosis.confidence.value,
        "quiet_s": round(quiet_s, 3),
        "culprits": culprits,
        "num_ranks": len(evidence),
        "num_silent": list(evidence.values()).count(None),
        "ranks": rows,
        "stacks": _stacks(evidence, outside_stacks),
    }


def _where(place: RankPlace) -> dict[str, Any]:
    return {
        "rank": place.rank,
        "node_id": place.node_id,
        "address": place.address,
        "gpu": place.gpu,
        "pid": place.pid,
    }


def _row(place: RankPlace, row: RankEvidence | None) -> dict[str, Any]:
    """Returns what one rank does; `answered` is the only field of one that is silent."""
    if row is None:
        return {**_where(place), "answered": False}
    wait = None
    if row.wait is not None:
        wait = {
            "operation": row.wait.operation,
            "axis": row.wait.axis,
            "number": row.wait.number,
            "peer": row.wait.peer,
            "seconds": round(row.wait.seconds, 3),
        }
    innermost = None
    if row.frames:
        innermost = str(row.frames[0])
    return {
        **_where(place),
        "answered": True,
        "phase": row.phase,
        "step": row.step,
        "microbatch": row.microbatch,
        "waits_in": wait,
        "innermost": innermost,
        "threads": list(row.threads),
        "memory_bytes": row.memory_bytes,
        "free_memory_bytes": row.free_memory_bytes,
        "device_memory_bytes": row.device_memory_bytes,
        "load": row.load,
        "device_collectives": list(row.device_collectives),
    }


def _stacks(evidence: Evidence, outside_stacks: Mapping[int, str]) -> list[dict[str, Any]]:
    stacks = []
    for rank, text in sorted(outside_stacks.items())[:MAX_STACKS]:
        stacks.append({"ranks": [rank], "lines": text.splitlines()})
    answered = [row for row in evidence.values() if row is not None]
    for ranks, frames in stacks_by_ranks(answered, MAX_STACKS - len(stacks)):
        stacks.append({"ranks": ranks[:MAX_RANKS], "lines": list(map(str, frames))})
    return stacks
