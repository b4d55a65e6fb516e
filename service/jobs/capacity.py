"""Counts how many ranks fit in a cluster.

Owns: islands per node. Pure. Must not know: jobs' states, the database.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from megatron_ray.planning.hardware import Hardware, hardware_named
from workers.decisions.topology import room
from workers.decisions.topology.node_rules import NodeRules, has_gpus, is_usable
from workers.decisions.topology.room import Demand, FreeNode, Shape
from workers.protocol.job import JobSpec
from workers.protocol.wire import NodeInfo


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

    Nodes that are dead, or that cannot read the shared storage, do not count.
    """

    def __init__(self, nodes: Iterable[NodeInfo]) -> None:
        self._nodes: list[FreeNode] = []
        for node in nodes:
            if is_usable(node):
                self._nodes.append(FreeNode.empty(node))
        self.is_known = bool(self._nodes)
        """False while no usable node has been reported."""

    def among(self, rules: NodeRules) -> "ClusterCapacity":
        """Returns the capacity of the nodes that a job may use."""
        chosen = ClusterCapacity(())
        for node in self._nodes:
            if rules.allows(node.node):
                chosen._nodes.append(node)
        chosen.is_known = self.is_known
        return chosen

    @property
    def nodes(self) -> tuple[NodeInfo, ...]:
        """The nodes that count."""
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

    def max_ranks(self, request: ResourceRequest) -> int:
        """Returns how many ranks of this kind fit, in whole islands."""
        demand = request.demand
        return room.max_islands(self._nodes, demand, self._shape(demand)) * request.island

    def reserve(self, request: ResourceRequest) -> bool:
        """Reserves room for a job; False, and nothing reserved, when it does not fit."""
        demand = request.demand
        islands = request.ranks // request.island
        return room.reserve(self._nodes, demand, self._shape(demand), islands) is not None

    def reserve_admitted(
        self, request: ResourceRequest, ranks_by_node: Mapping[str, int]
    ) -> None:
        """Reserves the resources of an admitted job.

        `ranks_by_node` is empty while it is unknown where the ranks are; room is then
        reserved on any nodes.
        """
        per_rank = request.demand.per_rank
        if ranks_by_node:
            for node in self._nodes:
                node.take(per_rank, ranks_by_node.get(node.node.node_id, 0))
        elif not self.reserve(request):
            # The job has its ranks even if the report shows less, so the remainder is
            # reserved.
            islands = self.max_ranks(request) // request.island
            demand = request.demand
            room.reserve(self._nodes, demand, self._shape(demand), islands)

    def _shape(self, demand: Demand) -> Shape:
        # As on the empty cluster: what is in use changes nothing about how islands lie.
        return room.shape_of(self.nodes, demand)

    def _gpu_nodes(self) -> list[NodeInfo]:
        return [node for node in self.nodes if node.gpus >= 1]


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
        rules=NodeRules.of(resources),
    )
