"""Gathers what one rank has measured, from its reports.

Owns: which part a report is of. Pure. Must not know: Ray, torch, the other ranks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class RankSpeeds:
    """The measurements of one rank so far; rates are bytes per second."""

    rank: int
    device: str = ""
    """Name of its device; empty before that is measured."""
    flops: float | None = None
    """Floating-point operations per second of its products."""
    memory: float | None = None
    """Bandwidth of its memory."""
    problem: str | None = None
    """What is wrong with its products."""
    node: float | None = None
    """All-reduce among the ranks of its node."""
    links: Mapping[int, float] = field(default_factory=dict)
    """Messages to ranks of other nodes, by rank."""
    world: float | None = None
    """All-reduce among all ranks."""
    broken: str | None = None
    """Why its connections do not work."""

    def has(self, part: str, peer: int | None) -> bool:
        """Whether a part is measured."""
        if part == "device":
            return bool(self.device)
        if part == "link":
            return peer in self.links
        if part == "node":
            return self.node is not None
        return self.world is not None

    def with_report(self, data: Mapping[str, Any]) -> "RankSpeeds":
        """Returns the measurements with those of a SpeedReport, as JSON."""
        part = data["part"]
        rate = data.get("bytes_per_s")
        if part == "device":
            return replace(
                self,
                device=data["device"],
                flops=data["flops"],
                memory=rate,
                problem=data.get("problem"),
            )
        if rate is None:
            return replace(self, broken=str(data.get("problem")))
        if part == "link":
            return replace(self, links={**self.links, data["peer"]: rate})
        if part == "node":
            return replace(self, node=rate)
        return replace(self, world=rate)
