"""Counts how many ranks fit in a cluster, and on nodes that it may still be given.

Owns: islands per node. Pure. Must not know: jobs' states, the database.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from megatron_ray.planning.hardware import Hardware, hardware_named
from megatron_ray.validation import resolution
from workers.decisions.cluster_growth import group_of, nodes_to_come
from workers.decisions.topology import room
from workers.decisions.topology.node_rules import NodeRules, has_gpus, is_usable
from workers.decisions.topology.room import Demand, FreeNode, Shape
from workers.protocol.job import JobSpec
from workers.protocol.wire import NodeGroup, NodeInfo


@dataclass(frozen=True)
class ResourceRequest:
    """The resources of a job: ranks in islands, each of which must fit on one node.

    Where no node is large enough, on the nodes of one NVLink domain.
    """

    ranks: int
    island: int
    """Ranks that must share a node: a tensor-parallel group."""
    cpus_per_rank: float
    gpu: bool
    """Whether each rank needs a GPU beside its CPUs."""
    custom: Mapping[str, float] = field(default_factory=dict)
    """Custom resources of each rank."""
    rules: NodeRules = field(default_factory=NodeRules)
    """Which nodes may be used."""

    @property
    def demand(self) -> Demand:
        """The request as placement counts it."""
        per_rank = {"CPU": self.cpus_per_rank, **self.custom}
        if self.gpu:
            per_rank["GPU"] = 1.0
        return Demand(per_rank, self.island, self.rules)


class ClusterCapacity:
    """The free resources of each node of a cluster; reservations reduce them.

    Nodes that are dead, or that cannot read the shared storage, do not count. Nodes that
    the cluster may still be given by its groups do, after those that are there.
    """

    def __init__(self, nodes: Sequence[NodeInfo], groups: Sequence[NodeGroup] = ()) -> None:
        # Those that are there come first.
        self._nodes: list[FreeNode] = []
        for node in nodes:
            if is_usable(node):
                self._nodes.append(FreeNode.empty(node))
        self._new: dict[str, str] = {}
        """Groups of the nodes that are not there yet, by node id."""
        for node in nodes_to_come(nodes, groups):
            self._nodes.append(FreeNode.empty(node))
            self._new[node.node_id] = group_of(node)
        self.is_known = bool(self._nodes)
        """False while no usable node has been reported, and no group of nodes."""

    def among(self, rules: NodeRules) -> "ClusterCapacity":
        """Returns the capacity of the nodes that a job may use."""
        chosen = ClusterCapacity(())
        for node in self._nodes:
            if rules.allows(node.node):
                chosen._nodes.append(node)
        chosen._new = self._new
        chosen.is_known = self.is_known
        return chosen

    @property
    def nodes(self) -> tuple[NodeInfo, ...]:
        """The nodes that count, those included that are not there yet."""
        return tuple(node.node for node in self._nodes)

    @property
    def has_gpus(self) -> bool:
        """Whether `accelerator: auto` means GPUs."""
        return has_gpus(self.nodes)

    @property
    def gpu_hardware(self) -> Hardware | None:
        """The cluster's GPU; where there are several kinds, the one with most memory.

        None when a node with GPUs does not name them, or names an unknown kind.
        """
        largest: Hardware | None = None
        for node in self._gpu_nodes():
            hardware = hardware_named(node.accelerator_type)
            if hardware is None:
                # A limit that leaves this node out could refuse a job that fits on it.
                return None
            if largest is None or (hardware.memory_bytes or 0) > (
                largest.memory_bytes or 0
            ):
                largest = hardware
        return largest

    @property
    def largest_node_cpus(self) -> float:
        """CPUs of the node that has most."""
        largest = 0.0
        for node in self._nodes:
            largest = max(largest, node.node.cpus)
        return largest

    @property
    def largest_node_memory_bytes(self) -> int:
        """Memory of the node that has most; 0 while that of a node is not known."""
        sizes = [node.memory_bytes for node in self.nodes]
        if not all(sizes):
            return 0
        return max(sizes, default=0)

    def max_ranks(self, request: ResourceRequest, *, may_grow: bool = True) -> int:
        """Returns how many ranks of this kind fit, in whole islands.

        `may_grow`: whether nodes that are not there yet count.
        """
        nodes = self._nodes
        if not may_grow:
            nodes = self._present()
        demand = request.demand
        return room.max_islands(nodes, demand, self._shape(demand)) * request.island

    def reserve(self, request: ResourceRequest) -> bool:
        """Reserves room for a job; False, and nothing reserved, when it does not fit."""
        return self._take(request) is not None

    def new_nodes(self, request: ResourceRequest) -> dict[str, int]:
        """Returns how many nodes of each group a job needs beside those that are there.

        Empty for a job that does not fit at all.
        """
        trial = ClusterCapacity(())
        for node in self._nodes:
            trial._nodes.append(FreeNode(node.node, dict(node.free)))
        trial._new = self._new
        counts: Counter[str] = Counter()
        for node_id in trial._take(request) or ():
            if node_id in self._new:
                counts[self._new[node_id]] += 1
        return dict(counts)

    def reserve_admitted(
        self, request: ResourceRequest, ranks_by_node: Mapping[str, int]
    ) -> None:
        """Reserves the resources of an admitted job.

        `ranks_by_node` is empty while it is unknown where the ranks are, and has fewer than
        the job's while it runs shrunk; room for the others is reserved on any nodes.
        """
        per_rank = request.demand.per_rank
        for node in self._nodes:
            node.take(per_rank, ranks_by_node.get(node.node.node_id, 0))
        missing = request.ranks - sum(ranks_by_node.values())
        if missing > 0 and not self.reserve(replace(request, ranks=missing)):
            # The job has its ranks even if the report shows less, so the remainder is
            # reserved.
            self._take(replace(request, ranks=self.max_ranks(request)))

    def _take(self, request: ResourceRequest) -> Mapping[str, int] | None:
        """Takes the room of a job; returns its ranks by node id, None if it does not fit."""
        demand = request.demand
        shape = self._shape(demand)
        islands = request.ranks // request.island
        present = self._present()
        if not self._new:
            return room.reserve(present, demand, shape, islands)
        to_come = self._nodes[len(present) :]
        # Nodes that are there first; of the others as few as possible.
        first = min(islands, room.max_islands(present, demand, shape))
        if first + room.max_islands(to_come, demand, shape) < islands:
            # Unless islands of one NVLink domain lie on nodes of both kinds.
            return room.reserve(self._nodes, demand, shape, islands)
        ranks = dict(room.reserve(present, demand, shape, first) or {})
        for nodes, share in _shares(to_come, demand, shape, islands - first):
            ranks |= room.reserve(nodes, demand, shape, share) or {}
        return ranks

    def _present(self) -> list[FreeNode]:
        present = []
        for node in self._nodes:
            if node.node.node_id not in self._new:
                present.append(node)
        return present

    def _shape(self, demand: Demand) -> Shape:
        # As on the empty cluster: what is in use changes nothing about how islands lie.
        return room.shape_of(self.nodes, demand)

    def _gpu_nodes(self) -> list[NodeInfo]:
        return [node for node in self.nodes if node.gpus >= 1]


def _shares(
    nodes: Sequence[FreeNode], demand: Demand, shape: Shape, islands: int
) -> list[tuple[list[FreeNode], int]]:
    """Divides islands over nodes that are not there yet.

    The largest nodes get most, and what is left the smallest that has room for it.
    """
    # Islands of a domain lie on several nodes, which are taken together.
    if shape.domain_label is not None:
        return [(list(nodes), islands)]
    sizes = {}
    for node in nodes:
        sizes[node.node.node_id] = room.max_islands([node], demand, shape)
    largest_first = sorted(nodes, key=lambda node: -sizes[node.node.node_id])
    shares = []
    for index, node in enumerate(largest_first):
        if islands == 0:
            break
        if sizes[node.node.node_id] > islands:
            for smaller in largest_first[index:]:
                if sizes[smaller.node.node_id] >= islands:
                    node = smaller
        share = min(islands, sizes[node.node.node_id])
        shares.append(([node], share))
        islands -= share
    return shares


def resource_request(spec: JobSpec, ranks: int, *, has_gpus: bool) -> ResourceRequest:
    """Returns the resources of a spec at a number of ranks.

    `has_gpus` decides what `accelerator: auto` means.
    """
    resources = spec.resources
    prefers_gpu = has_gpus or resources.gpu_type is not None
    is_auto = resources.accelerator == "auto"
    return ResourceRequest(
        ranks=ranks,
        island=spec.parallel.tp,
        cpus_per_rank=resources.cpus_per_rank,
        gpu=resources.accelerator == "gpu" or (is_auto and prefers_gpu),
        custom=resources.custom,
        rules=NodeRules.of(spec),
    )


def resolved_request(spec: JobSpec) -> ResourceRequest:
    """Returns the resources of a resolved spec."""
    # `auto` was resolved with the spec, so whether there are GPUs plays no part.
    return resource_request(spec, resolution.world_size(spec), has_gpus=False)
