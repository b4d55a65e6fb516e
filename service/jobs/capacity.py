"""How many ranks a cluster has room for.

Owns: counting islands per node. Pure. Must not know: jobs, the database.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megatron_ray.planning.hardware import Hardware, hardware_named
from workers.decisions.placement import is_usable, islands_that_fit
from workers.protocol.job import JobSpec
from workers.protocol.wire import NodeInfo


@dataclass(frozen=True)
class ResourceRequest:
    """What a job asks of a cluster: ranks in islands that may not span nodes."""

    ranks: int
    island: int
    """Ranks that must share a node: a tensor-parallel group."""
    cpus_per_rank: float
    gpu: bool
    """One GPU per rank, beside its CPUs."""


@dataclass
class _Node:
    node_id: str
    cpus: float
    gpus: float
    accelerator: str | None = None

    def islands(self, need: ResourceRequest) -> int:
        per_rank = {"CPU": need.cpus_per_rank}
        if need.gpu:
            per_rank["GPU"] = 1.0
        available = {"CPU": self.cpus, "GPU": self.gpus}
        return islands_that_fit(available, per_rank, need.island)

    def take(self, need: ResourceRequest, ranks: int) -> None:
        self.cpus -= ranks * need.cpus_per_rank
        self.gpus -= ranks if need.gpu else 0


class ClusterCapacity:
    """What is free on each node; `take` uses it up."""

    def __init__(self, nodes: Iterable[NodeInfo]) -> None:
        """Nodes that are dead, or that cannot read the shared storage, do not count."""
        usable = [node for node in nodes if is_usable(node)]
        self._nodes = [
            _Node(node.node_id, node.cpus, node.gpus, node.accelerator_type)
            for node in usable
        ]

    @property
    def known(self) -> bool:
        """False while no node has been reported."""
        return bool(self._nodes)

    @property
    def has_gpus(self) -> bool:
        """Whether `accelerator: auto` means GPUs."""
        return any(node.gpus >= 1 for node in self._nodes)

    @property
    def gpu(self) -> Hardware | None:
        """The cluster's GPU, the one with most memory where there are several kinds;
        None while a node with GPUs does not say, or names one that is not known here.
        """
        found = [hardware_named(node.accelerator) for node in self._nodes if node.gpus >= 1]
        known = [device for device in found if device is not None]
        return (
            max(known, key=lambda device: device.memory_bytes or 0)
            if known and len(known) == len(found)
            else None
        )

    @property
    def most_cpus(self) -> float:
        """CPUs of the largest node."""
        return max((node.cpus for node in self._nodes), default=0)

    def ranks(self, need: ResourceRequest) -> int:
        """Ranks that could be placed, in whole islands."""
        return need.island * sum(node.islands(need) for node in self._nodes)

    def take(self, need: ResourceRequest) -> bool:
        """Places a job, fullest nodes first, so that big gaps stay big; takes nothing
        and returns False when it does not fit.
        """
        if self.ranks(need) < need.ranks:
            return False
        left = need.ranks // need.island
        for node in sorted(self._nodes, key=lambda node: node.islands(need)):
            islands = min(left, node.islands(need))
            node.take(need, islands * need.island)
            left -= islands
        return True

    def hold(self, need: ResourceRequest, placed: Mapping[str, int]) -> None:
        """Uses up what a running job holds: where its ranks are known to be, or
        somewhere while that is not known.
        """
        if placed:
            for node in self._nodes:
                node.take(need, placed.get(node.node_id, 0))
        elif not self.take(need):
            for node in (
                self._nodes
            ):  # it holds what it holds, even if the report says that there is less
                node.take(need, node.islands(need) * need.island)


def need_of(spec: JobSpec, ranks: int, *, has_gpus: bool) -> ResourceRequest:
    """What a spec asks for, at a number of ranks."""
    accelerator = spec.resources.accelerator
    gpu = has_gpus if accelerator == "auto" else accelerator == "gpu"
    return ResourceRequest(
        ranks=ranks,
        island=spec.parallel.tp,
        cpus_per_rank=spec.resources.cpus_per_rank,
        gpu=gpu,
    )
