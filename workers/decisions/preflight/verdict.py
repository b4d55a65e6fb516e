"""Defines the result of a pre-flight and its sentences.

Owns: the fields of the events `preflight.passed` and `preflight.failed`. Pure. Must not
know: how a verdict is reached, what follows.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from operator import attrgetter
from typing import Any

from workers.decisions.preflight.figures import flops_text, rate_text
from workers.protocol.wording import counted

_MAX_ROWS = 512
"""Nodes, and links, that an event lists; the slowest come first."""


@dataclass(frozen=True)
class BlamedNode:
    """A node that is bad, and why."""

    node_id: str
    address: str
    reason: str

    def sentence(self) -> str:
        """Returns the node with the reason."""
        return f"node {self.address}: {self.reason}"


def blame(nodes: Iterable[BlamedNode]) -> str:
    """Returns bad nodes with their reasons in one line."""
    return f"pre-flight: {'; '.join(map(BlamedNode.sentence, nodes))}"


@dataclass(frozen=True)
class LinkSpeed:
    """What ranks of two nodes have measured with each other."""

    nodes: tuple[str, str]
    """Ids of the nodes."""
    addresses: tuple[str, str]
    """With ids where nodes share an address."""
    bytes_per_s: float
    """Of each rank in each direction; the slowest pair of ranks counts."""
    is_slow: bool


@dataclass(frozen=True)
class NodeSpeed:
    """What the ranks of a node have measured; the slowest of them counts."""

    node_id: str
    address: str
    num_ranks: int
    device: str
    flops: float | None
    memory_bytes_per_s: float | None
    all_reduce_bytes_per_s: float | None
    """Among the ranks of the node; None for a single one."""


@dataclass(frozen=True)
class Verdict:
    """What follows from the measurements."""

    nodes: tuple[NodeSpeed, ...]
    links: tuple[LinkSpeed, ...]
    all_reduce_bytes_per_s: float | None
    """Among all ranks; None on a single node."""
    bad: tuple[BlamedNode, ...] = ()
    """Nodes to leave out."""
    warnings: tuple[str, ...] = ()
    """What is slow, without a node to leave out."""
    blocked: str | None = None
    """Why the measurements have no end; None: they have."""

    @property
    def has_passed(self) -> bool:
        """Whether the job may train on these nodes."""
        return not self.bad and self.blocked is None

    def failure(self) -> str:
        """Returns why the attempt ends, without figures; they are in the verdict's event."""
        if not self.bad:
            return self.sentence()
        noun = "bad node"
        if len(self.bad) > 1:
            noun = "bad nodes"
        addresses = ", ".join(map(attrgetter("address"), self.bad))
        return f"pre-flight: {noun} {addresses}"

    def sentence(self) -> str:
        """Returns the verdict in one line."""
        if self.bad:
            return blame(self.bad)
        if self.blocked is not None:
            return f"pre-flight: {self.blocked}"
        nodes = counted(len(self.nodes), "node")
        text = f"pre-flight passed on {nodes}: {self._figures()}"
        return "; ".join([text, *self.warnings])

    def _figures(self) -> str:
        """Returns the lowest figures of all nodes."""
        flops = []
        memory = []
        reduced = []
        for node in self.nodes:
            if node.flops is not None and node.memory_bytes_per_s is not None:
                flops.append(node.flops)
                memory.append(node.memory_bytes_per_s)
            if node.all_reduce_bytes_per_s is not None:
                reduced.append(node.all_reduce_bytes_per_s)
        parts = []
        if flops:
            parts.append(f"matmul {flops_text(min(flops))}")
            parts.append(f"memory {rate_text(min(memory))}")
        if reduced:
            parts.append(f"all-reduce in a node {rate_text(min(reduced))}")
        if self.links:
            slowest = min(map(attrgetter("bytes_per_s"), self.links))
            parts.append(f"links {rate_text(slowest)}")
        if self.all_reduce_bytes_per_s is not None:
            parts.append(f"all-reduce of all {rate_text(self.all_reduce_bytes_per_s)}")
        return f"{', '.join(parts)} at least"

    def to_data(self) -> dict[str, Any]:
        """Returns the verdict as data of an event."""
        nodes = sorted(self.nodes, key=lambda node: node.flops or 0.0)
        links = sorted(self.links, key=lambda link: link.bytes_per_s)
        return {
            "nodes": list(map(asdict, nodes[:_MAX_ROWS])),
            "links": list(map(asdict, links[:_MAX_ROWS])),
            "num_nodes": len(nodes),
            "num_links": len(links),
            "all_reduce_bytes_per_s": self.all_reduce_bytes_per_s,
            "bad": list(map(asdict, self.bad)),
            "warnings": list(self.warnings),
            "blocked": self.blocked,
        }
