"""Counts how many ranks fit in a cluster, and on nodes that it may still be given.

Owns: islands per node. Pure. Must not know: jobs' states, the database.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_ray.planning.hardware import Hardware, hardware_named
from workers.decisions.growth import group_of, nodes_to_come
from workers.decisions.placement import is_usable, islands_that_fit
from workers.protocol.job import JobSpec
from workers.protocol.wire import NodeGroup, NodeInfo


@dataclass(frozen=True)
class ResourceRequest:
    """The resources of a job: ranks in islands, each of which must fit on one node."""

    ranks: int
    island: int
    """Ranks that must share a node: a tensor-parallel group."""
    cpus_per_rank: float
    gpu: bool
    """Whether each rank needs a GPU beside its CPUs."""


@dataclass
class _FreeNode:
    """The free CPUs and GPUs of one node."""

    node_id: str
    cpus: float
    gpus: float
    accelerator: str | None = None
    to_come_of: str | None = None
    """Group of a node that is not there yet; None for one that is."""

    def max_islands(self, request: ResourceRequest) -> int:
        per_rank = {"CPU": request.cpus_per_rank}
        if request.gpu:
            per_rank["GPU"] = 1.0
        available = {"CPU": self.cpus, "GPU": self.gpus}
        # The rule by which the driver places ranks, so that both agree.
        return islands_that_fit(available, per_rank, request.island)

    def reserve(self, request: ResourceRequest, ranks: int) -> None:
        self.cpus -= ranks * request.cpus_per_rank
        if request.gpu:
            self.gpus -= ranks


class ClusterCapacity:
    """The free resources of each node of a cluster; reservations reduce them.

    Nodes that are dead, or that cannot read the shared storage, do not count. Nodes that
    the cluster may still be given by its groups do, after those that are there.
    """

    def __init__(self, nodes: Sequence[NodeInfo], groups: Sequence[NodeGroup] = ()) -> None:
        self._nodes: list[_FreeNode] = []
        for node in nodes:
            if is_usable(node):
                self._add(node, None)
        for node in nodes_to_come(nodes, groups):
            self._add(node, group_of(node))

    def _add(self, node: NodeInfo, to_come_of: str | None) -> None:
        free = _FreeNode(
            node.node_id, node.cpus, node.gpus, node.accelerator_type, to_come_of
        )
        self._nodes.append(free)

    @property
    def is_known(self) -> bool:
        """False while no usable node has been reported, and no group of nodes."""
        return bool(self._nodes)

    @property
    def has_gpus(self) -> bool:
        """Whether `accelerator: auto` means GPUs."""
        return bool(self._gpu_nodes())

    @property
    def gpu_hardware(self) -> Hardware | None:
        """The cluster's GPU; where there are several kinds, the one with most memory.

        None when a node with GPUs does not name them, or names an unknown kind.
        """
        largest: Hardware | None = None
        for node in self._gpu_nodes():
            hardware = hardware_named(node.accelerator)
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
            largest = max(largest, node.cpus)
        return largest

    def max_ranks(self, request: ResourceRequest, *, may_grow: bool = True) -> int:
        """Returns how many ranks of this kind fit, in whole islands.

        `may_grow`: whether nodes that are not there yet count.
        """
        islands = 0
        for node in self._nodes:
            if may_grow or node.to_come_of is None:
                islands += node.max_islands(request)
        return islands * request.island

    def reserve(self, request: ResourceRequest) -> bool:
        """Reserves room for a job; False, and nothing reserved, when it does not fit."""
        # Checked first, so that a job that does not fit leaves no node half reserved.
        if self.max_ranks(request) < request.ranks:
            return False
        for node, islands in self._choose(request):
            node.reserve(request, islands * request.island)
        return True

    def new_nodes(self, request: ResourceRequest) -> dict[str, int]:
        """Returns how many nodes of each group a job that fits needs beside today's."""
        counts: Counter[str] = Counter()
        for node, _ in self._choose(request):
            if node.to_come_of is not None:
                counts[node.to_come_of] += 1
        return dict(counts)

    def _choose(self, request: ResourceRequest) -> list[tuple[_FreeNode, int]]:
        """Returns the nodes for a job that fits, and how many islands each gets."""
        # Whole islands only: a tensor-parallel group must not span nodes.
        remaining = request.ranks // request.island
        chosen = []
        # The fullest nodes are used first, so that large gaps stay large.
        present = [node for node in self._nodes if node.to_come_of is None]
        for node in sorted(present, key=lambda node: node.max_islands(request)):
            islands = min(remaining, node.max_islands(request))
            if islands:
                chosen.append((node, islands))
            remaining -= islands
        # Of what is not there yet as few nodes as possible, the last one not too large.
        to_come = [node for node in self._nodes if node.to_come_of is not None]
        rooms = sorted(to_come, key=lambda node: -node.max_islands(request))
        for index, node in enumerate(rooms):
            if remaining == 0:
                break
            islands = node.max_islands(request)
            if islands > remaining:
                node = _smallest_with_room(rooms[index:], request, remaining)
                islands = remaining
            chosen.append((node, islands))
            remaining -= islands
        return chosen

    def reserve_admitted(
        self, request: ResourceRequest, ranks_by_node: Mapping[str, int]
    ) -> None:
        """Reserves the resources of an admitted job.

        `ranks_by_node` is empty while it is unknown where the ranks are; room is then
        reserved on any nodes.
        """
        if ranks_by_node:
            for node in self._nodes:
                node.reserve(request, ranks_by_node.get(node.node_id, 0))
        elif not self.reserve(request):
            # The job has its ranks even if the report shows less, so the remainder is
            # reserved.
            for node in self._nodes:
                node.reserve(request, node.max_islands(request) * request.island)

    def _gpu_nodes(self) -> list[_FreeNode]:
        return [node for node in self._nodes if node.gpus >= 1]


def _smallest_with_room(
    nodes: Sequence[_FreeNode], request: ResourceRequest, islands: int
) -> _FreeNode:
    """Returns the last of nodes, largest first, that has room for so many islands."""
    smallest = nodes[0]
    for node in nodes:
        if node.max_islands(request) >= islands:
            smallest = node
    return smallest


def resource_request(spec: JobSpec, ranks: int, *, has_gpus: bool) -> ResourceRequest:
    """Returns the resources of a spec at a number of ranks.

    `has_gpus` decides what `accelerator: auto` means.
    """
    accelerator = spec.resources.accelerator
    gpu = accelerator == "gpu" or (accelerator == "auto" and has_gpus)
    return ResourceRequest(
        ranks=ranks,
        island=spec.parallel.tp,
        cpus_per_rank=spec.resources.cpus_per_rank,
        gpu=gpu,
    )
