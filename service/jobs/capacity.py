"""Counts how many ranks fit in a cluster.

Owns: islands per node. Pure. Must not know: jobs' states, the database.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from megatron_ray.planning.hardware import Hardware, hardware_named
from workers.decisions.placement import is_usable, islands_that_fit
from workers.protocol.job import JobSpec
from workers.protocol.wire import NodeInfo


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

    Nodes that are dead, or that cannot read the shared storage, do not count.
    """

    def __init__(self, nodes: Iterable[NodeInfo]) -> None:
        self._nodes: list[_FreeNode] = []
        for node in nodes:
            if is_usable(node):
                self._nodes.append(
                    _FreeNode(node.node_id, node.cpus, node.gpus, node.accelerator_type)
                )

    @property
    def is_known(self) -> bool:
        """False while no usable node has been reported."""
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

    def max_ranks(self, request: ResourceRequest) -> int:
        """Returns how many ranks of this kind fit, in whole islands."""
        islands = 0
        for node in self._nodes:
            islands += node.max_islands(request)
        return islands * request.island

    def reserve(self, request: ResourceRequest) -> bool:
        """Reserves room for a job; False, and nothing reserved, when it does not fit.

        The fullest nodes are used first, so that large gaps stay large.
        """
        # Checked first, so that a job that does not fit leaves no node half reserved.
        if self.max_ranks(request) < request.ranks:
            return False
        # Whole islands only: a tensor-parallel group must not span nodes.
        remaining = request.ranks // request.island
        for node in sorted(self._nodes, key=lambda node: node.max_islands(request)):
            islands = min(remaining, node.max_islands(request))
            node.reserve(request, islands * request.island)
            remaining -= islands
        return True

    def reserve_admitted(
        self, request: ResourceRequest, ranks_by_node: Mapping[str, int]
    ) -> None:
        """Reserves the resources of an admitted job.

        `ranks_by_node` is empty while it is unknown where the ranks are, and has fewer than
        the job's while it runs shrunk; room for the others is reserved on any nodes.
        """
        for node in self._nodes:
            node.reserve(request, ranks_by_node.get(node.node_id, 0))
        missing = request.ranks - sum(ranks_by_node.values())
        if missing > 0 and not self.reserve(replace(request, ranks=missing)):
            # The job has its ranks even if the report shows less, so the remainder is
            # reserved.
            for node in self._nodes:
                node.reserve(request, node.max_islands(request) * request.island)

    def _gpu_nodes(self) -> list[_FreeNode]:
        return [node for node in self._nodes if node.gpus >= 1]


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
