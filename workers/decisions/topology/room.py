"""Counts how many islands of ranks fit on nodes.

Owns: the one rule by which admission reserves and placement plans. Pure. Must not know:
Ray, jobs' states, specs.

An island is a tensor-parallel group. It shares a node, so that it has NVLink. Where no
node is large enough but nodes carry an NVLink domain, it shares a domain instead, in
equal parts on several nodes.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import floor

from workers.decisions.topology.node_rules import NodeRules, domain_label
from workers.protocol.wire import NodeInfo

_EPSILON = 1e-6
"""Tolerance in islands: 0.3 CPUs hold three ranks of 0.1, yet 0.3 / 0.1 < 3 in floats."""


@dataclass(frozen=True)
class Demand:
    """What each rank needs, and how many of them belong together."""

    per_rank: Mapping[str, float]
    """Amounts by Ray's resource names."""
    island: int
    """Ranks of a tensor-parallel group."""
    rules: NodeRules = field(default_factory=NodeRules)


@dataclass(frozen=True)
class Shape:
    """How islands lie on nodes."""

    part: int
    """Ranks of an island that share a node: all of them, unless there is a domain."""
    domain_label: str | None = None
    """Label of the NVLink domain that an island shares; None: it shares a node."""


@dataclass
class FreeNode:
    """A node and what is free on it, by Ray's resource names."""

    node: NodeInfo
    free: dict[str, float]

    @classmethod
    def empty(cls, node: NodeInfo) -> "FreeNode":
        """Returns a node of which nothing is in use."""
        return cls(node, resources_of(node))

    @classmethod
    def all_empty(cls, nodes: Iterable[NodeInfo]) -> "list[FreeNode]":
        """Returns nodes of which nothing is in use."""
        return [cls.empty(node) for node in nodes]

    def take(self, per_rank: Mapping[str, float], ranks: int) -> None:
        """Counts the resources of some ranks as used."""
        for name, amount in per_rank.items():
            self.free[name] = self.free.get(name, 0.0) - ranks * amount


def resources_of(node: NodeInfo) -> dict[str, float]:
    """Returns everything that a node has, by Ray's resource names."""
    return {**node.resources, "CPU": node.cpus, "GPU": node.gpus}


def islands_that_fit(
    available: Mapping[str, float], per_rank: Mapping[str, float], island: int
) -> int:
    """Returns how many islands of `island` ranks fit into the resources of one node.

    `available` and `per_rank` are by Ray's resource names.
    """
    counts = []
    for name, amount in per_rank.items():
        # A resource of which none is requested limits nothing.
        if amount > 0:
            counts.append(available.get(name, 0.0) / (amount * island))
    return max(0, floor(min(counts) + _EPSILON))


def shape_of(nodes: Iterable[NodeInfo], demand: Demand) -> Shape:
    """Returns how islands would lie on these nodes if nothing were in use.

    An island is taken apart only if no node holds a whole one.
    """
    usable = demand.rules.allowed(nodes)
    empty = FreeNode.all_empty(usable)
    whole = Shape(demand.island)
    label = domain_label(usable)
    if label is None or max_islands(empty, demand, whole):
        return whole
    best = whole
    most = 0
    # The largest of equally good parts, which sends least between nodes.
    for part in range(demand.island - 1, 0, -1):
        if demand.island % part == 0:
            shape = Shape(part, label)
            islands = max_islands(empty, demand, shape)
            if islands > most:
                best = shape
                most = islands
    return best


def max_islands(nodes: Sequence[FreeNode], demand: Demand, shape: Shape) -> int:
    """Returns how many islands fit on nodes that the demand's rules allow."""
    islands = 0
    parts_per_island = demand.island // shape.part
    for members in _places(nodes, demand, shape):
        parts = 0
        for node in members:
            parts += islands_that_fit(node.free, demand.per_rank, shape.part)
        islands += parts // parts_per_island
    return islands


def reserve(
    nodes: Sequence[FreeNode], demand: Demand, shape: Shape, islands: int
) -> Mapping[str, int] | None:
    """Takes the room of some islands; returns the ranks by node id.

    None, and nothing is taken, when they do not fit. The fullest nodes are used first,
    so that large gaps stay large.
    """
    # Checked first, so that a job that does not fit leaves no node half reserved.
    if max_islands(nodes, demand, shape) < islands:
        return None
    parts_per_island = demand.island // shape.part
    ranks: dict[str, int] = {}
    remaining = islands * parts_per_island
    for members in sorted(
        _places(nodes, demand, shape), key=lambda place: max_islands(place, demand, shape)
    ):
        # Whole islands only: parts that are left over in one domain belong to none.
        room = max_islands(members, demand, shape) * parts_per_island
        parts = min(remaining, room)
        remaining -= parts
        for node in members:
            taken = min(parts, islands_that_fit(node.free, demand.per_rank, shape.part))
            parts -= taken
            if taken:
                node.take(demand.per_rank, taken * shape.part)
                ranks[node.node.node_id] = taken * shape.part
    return ranks


def _places(
    nodes: Sequence[FreeNode], demand: Demand, shape: Shape
) -> list[list[FreeNode]]:
    """Returns the nodes in groups, each of which may hold a whole island."""
    places: dict[str, list[FreeNode]] = {}
    for node in nodes:
        if not demand.rules.allows(node.node):
            continue
        name: str | None = node.node.node_id
        if shape.domain_label is not None:
            name = node.node.labels.get(shape.domain_label)
        if name is not None:
            places.setdefault(name, []).append(node)
    return list(places.values())
