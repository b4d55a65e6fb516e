"""Plans the resources that a job requests from Ray.

Owns: the plan, what workers report of their places, and the explanation when a job does not
fit. Pure. Must not know: Ray, torch, which rank goes where (`rank_map`).

Ray never spreads a bundle over nodes, so tensor parallelism stays within a node by
construction (within an NVLink domain, where that is larger).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from pydantic import BaseModel, ConfigDict

from megatron_ray.parallel_dims import ParallelDims
from workers.decisions.topology.alternatives import nearest_layout
from workers.decisions.topology.arrangement import near_sizes
from workers.decisions.topology.bundles import (
    Bundle,
    bundle_size,
    common_domain,
    make_bundles,
)
from workers.decisions.topology.node_rules import (
    NODE_ID_LABEL,
    NodeRules,
    has_gpus,
    id_of,
    label_selector,
)
from workers.decisions.topology.room import (
    Demand,
    FreeNode,
    Shape,
    islands_that_fit,
    max_islands,
    resources_of,
    shape_of,
)
from workers.exceptions import WorkersError
from workers.protocol.job import JobSpec
from workers.protocol.wire import NodeInfo

_MAX_NODES_EXPLAINED = 8


class PlacementError(WorkersError):
    """The reported slots do not form the planned world; the message names the reason."""


@dataclass(frozen=True)
class PlacementPlan:
    """The resources to request from Ray, decided before anything is created."""

    accelerator: Literal["cpu", "gpu"]
    bundles: tuple[Bundle, ...]
    worker_resources: dict[str, float]
    """Resources of its bundle that one worker uses."""
    dims: ParallelDims
    capacity: int
    """Number of tensor-parallel groups that fit in the empty cluster."""
    node_reasons: Mapping[str, str] = field(default_factory=dict)
    """A line for each living node, by id: how many groups fit and the limiting resources."""
    avoid_nodes: tuple[str, ...] = ()
    """Ids of living nodes that must not be used."""
    allowed_nodes: tuple[str, ...] = ()
    """Ids of living nodes that may be used."""
    domain_label: str | None = None
    """Label of the NVLink domain that all bundles must share, chosen by Ray."""
    alternative: str | None = None
    """Degrees with which the job would fit, when it does not."""
    full_dims: ParallelDims | None = None
    """Degrees of the whole placement group, for a plan that uses a part of it."""

    @property
    def bundle_size(self) -> int:
        """Ranks of each bundle."""
        return len(self.bundles[0].slots)

    @property
    def is_feasible(self) -> bool:
        """Whether the job fits into the empty cluster; a busy one may still delay it."""
        return self.capacity * self.dims.tp >= self.dims.world_size

    def restricted_to(
        self, dims: ParallelDims, bundles: Iterable[Bundle]
    ) -> "PlacementPlan":
        """Returns the plan of a smaller world, on some bundles of the placement group."""
        return replace(self, dims=dims, bundles=tuple(bundles), full_dims=self.dims)

    def keeps_from(self, allowed_nodes: Iterable[str]) -> bool:
        """Whether the request leaves out a node that may be used by now."""
        # A request names nodes by the ids that they had when it was made.
        names_nodes = self.bundles[0].selector.get(NODE_ID_LABEL, "").startswith("in")
        for node_id in allowed_nodes:
            is_new = node_id not in self.allowed_nodes
            if node_id in self.avoid_nodes or (names_nodes and is_new):
                return True
        return False

    @property
    def explanation(self) -> str:
        """Compares the requested resources with those of each node."""
        tp = self.dims.tp
        island = {name: amount * tp for name, amount in self.worker_resources.items()}
        lines = list(self.node_reasons.values())
        reasons = "; ".join(lines[:_MAX_NODES_EXPLAINED]) or "it has no nodes"
        others = len(lines) - _MAX_NODES_EXPLAINED
        if others > 0:
            reasons = f"{reasons}; and {others} more nodes"
        text = (
            f"asked for {self.dims.world_size // tp} x {_format_resources(island)}, each on "
            f"one node; the cluster could hold {self.capacity}: {reasons}"
        )
        if self.alternative is not None:
            text = f"{text}; {self.alternative} would fit"
        return text


class SlotFacts(BaseModel):
    """The report of a worker about itself and its node."""

    model_config = ConfigDict(frozen=True)

    slot: int
    bundle: int
    node_id: str
    address: str
    pid: int
    gpu: int | None = None
    """Index on its node; None on CPU, and for a process to which Ray assigned none."""
    is_spare: bool = False
    """Started to wait until a rank dies."""
    gpu_uuid: str | None = None
    domain: str = ""
    """NVLink domain, where nodes carry such a label."""
    local_dir: str = ""
    """Folder on its node for report and log files."""


class RankPlace(BaseModel):
    """One row of the rank map; journals and records keep it."""

    model_config = ConfigDict(frozen=True)

    rank: int
    slot: int
    bundle: int
    node_id: str
    address: str
    gpu: int | None
    pid: int
    local_rank: int
    local_world_size: int
    node_rank: int
    coordinates: dict[str, int]
    local_dir: str = ""


def plan_placement(
    spec: JobSpec,
    nodes: Sequence[NodeInfo],
    accelerator: str | None = None,
    *,
    size: int | None = None,
    avoid: Mapping[str, str] | None = None,
) -> PlacementPlan:
    """Returns the bundles of a resolved spec and how many islands the empty cluster fits.

    `accelerator` and `size`, the ranks of a bundle, are those of an earlier plan; None:
    chosen from the spec and the nodes. `avoid` are nodes that must not be used: reasons
    by node id.
    """
    rules = NodeRules.of(spec, avoid)
    usable = rules.allowed(nodes)
    kind = resolve_accelerator(spec, usable, accelerator)
    dims = ParallelDims.of(spec.parallel)
    # From here on only usable nodes count, so that no node is judged again.
    only_type = NodeRules(gpu_type=rules.gpu_type)
    demand = Demand(resources_per_rank(spec, gpu=kind == "gpu"), dims.tp, only_type)
    if size is None:
        size = bundle_size(usable, demand, dims.world_size, near_sizes(dims))
    capacity, alternative = _capacity(spec, usable, demand, dims)
    reasons = _reasons(nodes, rules, demand, shape_of(usable, demand))
    allowed = list(map(id_of, usable))
    return PlacementPlan(
        accelerator=kind,
        bundles=make_bundles(
            usable, demand, dims.world_size, size, label_selector(nodes, rules)
        ),
        worker_resources=dict(demand.per_rank),
        dims=dims,
        capacity=capacity,
        node_reasons=reasons,
        avoid_nodes=tuple(sorted(reasons.keys() - allowed)),
        allowed_nodes=tuple(allowed),
        domain_label=common_domain(usable, demand, dims.world_size, size),
        alternative=alternative,
    )


def _capacity(
    spec: JobSpec, usable: Sequence[NodeInfo], demand: Demand, dims: ParallelDims
) -> tuple[int, str | None]:
    """Returns how many islands fit, and the nearest layout when they are too few."""
    empty = FreeNode.all_empty(usable)
    capacity = max_islands(empty, demand, shape_of(usable, demand))
    if capacity * dims.tp >= dims.world_size:
        return capacity, None
    return capacity, nearest_layout(spec, usable, demand)


def resolve_accelerator(
    spec: JobSpec, usable: Iterable[NodeInfo], earlier: str | None = None
) -> Literal["cpu", "gpu"]:
    """Returns what `accelerator: auto` means on the nodes that a job may use.

    `earlier` is the choice of an earlier plan, which is kept.
    """
    choice = earlier or spec.resources.accelerator
    if choice == "auto" and (spec.resources.gpu_type is not None or has_gpus(usable)):
        choice = "gpu"
    if choice == "gpu":
        return "gpu"
    return "cpu"


def resources_per_rank(spec: JobSpec, *, gpu: bool) -> dict[str, float]:
    """Returns the resources of one rank, by Ray's names."""
    # A rank uses one whole GPU or none; its CPUs may be a fraction.
    resources = {"CPU": spec.resources.cpus_per_rank}
    if gpu:
        resources["GPU"] = 1.0
    return resources | spec.resources.custom


def _reasons(
    nodes: Iterable[NodeInfo], rules: NodeRules, demand: Demand, shape: Shape
) -> dict[str, str]:
    """Returns what each living node has room for, or why it is left out, by its id."""
    reasons = {}
    for node in nodes:
        # That a dead node is not used needs no explanation.
        if not node.alive:
            continue
        refusal = rules.refusal(node)
        if refusal is None:
            reasons[node.node_id] = _reason(node, demand, shape)
        else:
            reasons[node.node_id] = f"node {node.address} is excluded: {refusal}"
    return reasons


def _reason(node: NodeInfo, demand: Demand, shape: Shape) -> str:
    resources = resources_of(node)
    available = {name: resources.get(name, 0.0) for name in demand.per_rank}
    room = islands_that_fit(resources, demand.per_rank, shape.part)
    text = f"node {node.address} has {_format_resources(available)}: room for {room}"
    if shape.domain_label is None:
        return text
    domain = node.labels.get(shape.domain_label, "none")
    return f"{text} x {shape.part} ranks, NVLink domain {domain}"


def _format_resources(resources: Mapping[str, float]) -> str:
    return " + ".join(f"{amount:g} {name}" for name, amount in sorted(resources.items()))
