"""Decides what the ranks wait for when a pre-flight has no end.

Owns: which of several unfinished parts is the cause. Pure. Must not know: Ray, torch,
clocks.

Ranks measure in a fixed order, so a rank that waits for one in an earlier part is no cause.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from workers.decisions.preflight.measured_nodes import MeasuredNodes
from workers.decisions.preflight.orders import preflight_orders
from workers.decisions.preflight.speeds import RankSpeeds

Part = tuple[str, int | None]


@dataclass(frozen=True)
class Blocked:
    """An unfinished part that others wait for."""

    sentence: str
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Why nodes are bad, by node id; none when only a link is to blame."""


def find_blocked(
    nodes: MeasuredNodes, speeds: Mapping[int, RankSpeeds], timeout_s: float
) -> Blocked | None:
    """Returns the earliest part that some ranks have not done; None: all are done."""
    search = _Search(nodes, speeds, timeout_s)
    waiting: dict[Part, list[int]] = {}
    broken = [rank for rank in speeds if speeds[rank].broken is not None]
    # Others may still measure when the connections of some do not work.
    for rank in broken or speeds:
        part = search.next_parts[rank]
        if part is not None:
            waiting.setdefault(part, []).append(rank)
    kinds = {kind for kind, _ in waiting}
    for kind in ("device", "node"):
        if kind in kinds:
            return search.blame_nodes(kind, waiting[kind, None])
    if "link" in kinds:
        return search.blame_links(broken)
    if kinds:
        how = search.describe(waiting["world", None])
        return Blocked(f"the all-reduce of all ranks {how}")
    return None


class _Search:
    """The unfinished parts of all ranks."""

    def __init__(
        self, nodes: MeasuredNodes, speeds: Mapping[int, RankSpeeds], timeout_s: float
    ) -> None:
        self._nodes = nodes
        self._speeds = speeds
        self._timeout_s = timeout_s
        self.next_parts: dict[int, Part | None] = {}
        """The first unfinished part of each rank; None: it has done all."""
        for rank, order in enumerate(preflight_orders(nodes.by_rank, timeout_s)):
            self.next_parts[rank] = None
            # The earliest comes last.
            for part in reversed(order.parts):
                if not speeds[rank].has(*part):
                    self.next_parts[rank] = part

    def blame_nodes(self, kind: str, ranks: Sequence[int]) -> Blocked:
        """Returns the nodes whose ranks have not ended a part of their own."""
        by_node: dict[str, list[int]] = {}
        for rank in ranks:
            by_node.setdefault(self._nodes.of(rank), []).append(rank)
        reasons = {}
        sentences = []
        for node_id, own in by_node.items():
            reason = f"the all-reduce in the node {self.describe(own)}"
            if kind == "device":
                where = self._nodes.device_label(own[0])
                reason = f"{where}products and copies {self.describe(own)}"
            reasons[node_id] = reason
            sentences.append(f"node {self._nodes.label(node_id)}: {reason}")
        return Blocked("; ".join(sentences), reasons)

    def blame_links(self, broken: Sequence[int]) -> Blocked:
        """Returns the links that do not work; else those whose ends wait for each other."""
        stuck: dict[tuple[str, str], list[int]] = {}
        for rank, part in self.next_parts.items():
            if part is None or part[0] != "link" or part[1] is None:
                continue
            is_mutual = self.next_parts[part[1]] == ("link", rank)
            if rank in broken or (is_mutual and not broken):
                stuck.setdefault(self._nodes.pair(rank, part[1]), []).append(rank)
        sentences = []
        for nodes, ranks in stuck.items():
            label = self._nodes.link_label(nodes)
            sentences.append(f"the link {label} {self.describe(ranks)}")
        return Blocked("; ".join(sentences))

    def describe(self, ranks: Sequence[int]) -> str:
        """Returns how a part of some ranks has not ended."""
        for rank in ranks:
            broken = self._speeds[rank].broken
            if broken is not None:
                return f"does not work: {broken}"
        return f"did not end within {self._timeout_s:g} s"
