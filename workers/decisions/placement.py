"""Plans on which nodes and GPUs ranks run.

Owns: the bundles before placement, the rank map after it, how many islands a node
holds, and the explanation when a job does not fit. Pure. Must not know: Ray, torch.

A bundle is an island: the ranks of one tensor-parallel group, which must share NVLink.
Ray never spreads a bundle over nodes, so tensor parallelism stays within a node by
construction. The order of bundles in Ray is arbitrary, so ranks are assigned from the
workers' reports.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import floor
from typing import Literal

from pydantic import BaseModel, ConfigDict

from megatron_ray.parallel_dims import ParallelDims
from workers.exceptions import WorkersError
from workers.protocol.job import JobSpec
from workers.protocol.wire import NodeInfo

_EPSILON = 1e-6
"""Tolerance in islands: 0.3 CPUs hold three ranks of 0.1, yet 0.3 / 0.1 < 3 in floats."""


class PlacementError(WorkersError):
    """The reported slots do not form the planned world; the message names the reason."""


@dataclass(frozen=True)
class Bundle:
    """One island: the resources requested on one node, and the slots (workers) in it."""

    index: int
    resources: dict[str, float]
    slots: tuple[int, ...]


@dataclass(frozen=True)
class PlacementPlan:
    """The resources to request from Ray, decided before anything is created."""

    accelerator: Literal["cpu", "gpu"]
    bundles: tuple[Bundle, ...]
    worker_resources: dict[str, float]
    """Resources of its bundle that one worker uses."""
    dims: ParallelDims
    capacity: int
    """Number of islands that fit in the empty cluster."""
    node_reasons: tuple[str, ...] = ()
    """One line per node: how many islands fit, and the limiting resources."""
    avoid_nodes: tuple[str, ...] = ()
    """Node ids that must not be used."""

    @property
    def is_feasible(self) -> bool:
        """Whether the job fits into the empty cluster; a busy one may still delay it."""
        return self.capacity >= len(self.bundles)

    @property
    def explanation(self) -> str:
        """Compares the requested resources with those of each node."""
        resources = _format_resources(self.bundles[0].resources)
        reasons = "; ".join(self.node_reasons) or "it has no nodes"
        return (
            f"asked for {len(self.bundles)} x {resources}, each on one node; "
            f"the cluster could hold {self.capacity}: {reasons}"
        )


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


def is_usable(node: NodeInfo) -> bool:
    """Whether ranks may start on a node: it is alive, and nothing keeps them away."""
    return node.alive and _exclusion(node) is None


def _exclusion(node: NodeInfo) -> str | None:
    """Returns why ranks may not start on a living node; None: they may."""
    if node.storage_ok is False:
        return "it cannot read the job storage"
    if node.draining:
        return "it is being drained"
    return node.excluded


def has_gpus(nodes: Iterable[NodeInfo]) -> bool:
    """Whether `accelerator: auto` means GPUs on these nodes."""
    for node in nodes:
        # A node without access to the storage cannot run ranks, so its GPUs do not
        # count.
        if node.gpus >= 1 and is_usable(node):
            return True
    return False


def islands_that_fit(
    available: Mapping[str, float], per_rank: Mapping[str, float], island: int
) -> int:
    """Returns how many islands of `island` ranks fit into the resources of one node.

    Admission and placement both count by this rule, so a job that is admitted can be
    placed. `available` and `per_rank` are by Ray's resource names.
    """
    counts = []
    for name, amount in per_rank.items():
        # A resource of which none is requested limits nothing.
        if amount > 0:
            counts.append(available.get(name, 0.0) / (amount * island))
    return max(0, floor(min(counts) + _EPSILON))


def plan_placement(
    spec: JobSpec, nodes: Sequence[NodeInfo], accelerator: str | None = None
) -> PlacementPlan:
    """Returns the bundles of a resolved spec and how many the empty cluster fits.

    `accelerator` is that of an earlier plan; None: chosen from the spec and the nodes.
    """
    kind = _accelerator(accelerator or spec.resources.accelerator, nodes)
    dims = ParallelDims.of(spec.parallel)
    # A rank uses one whole GPU or none; its CPUs may be a fraction.
    per_rank = {"CPU": spec.resources.cpus_per_rank}
    if kind == "gpu":
        per_rank["GPU"] = 1.0
    # Dead nodes are left out; living ones that cannot be used are explained to the user.
    living = [node for node in nodes if node.alive]
    capacity = 0
    reasons = []
    for node in living:
        islands = _islands_on(node, per_rank, dims.tp)
        capacity += islands
        reasons.append(_reason(node, per_rank, islands))
    return PlacementPlan(
        accelerator=kind,
        bundles=_bundles(dims, per_rank),
        worker_resources=per_rank,
        dims=dims,
        capacity=capacity,
        node_reasons=tuple(reasons),
        avoid_nodes=tuple(node.node_id for node in living if not is_usable(node)),
    )


def _accelerator(choice: str, nodes: Sequence[NodeInfo]) -> Literal["cpu", "gpu"]:
    if choice == "gpu" or (choice == "auto" and has_gpus(nodes)):
        return "gpu"
    return "cpu"


def _bundles(dims: ParallelDims, per_rank: Mapping[str, float]) -> tuple[Bundle, ...]:
    """Returns one bundle per tensor-parallel group, with consecutive slots."""
    resources = {name: amount * dims.tp for name, amount in per_rank.items()}
    bundles = []
    for index in range(dims.world_size // dims.tp):
        slots = range(index * dims.tp, (index + 1) * dims.tp)
        bundles.append(Bundle(index, resources, tuple(slots)))
    return tuple(bundles)


def _islands_on(node: NodeInfo, per_rank: Mapping[str, float], island: int) -> int:
    if not is_usable(node):
        return 0
    return islands_that_fit({"CPU": node.cpus, "GPU": node.gpus}, per_rank, island)


def _reason(node: NodeInfo, per_rank: Mapping[str, float], islands: int) -> str:
    exclusion = _exclusion(node)
    if exclusion is not None:
        return f"node {node.address} is excluded: {exclusion}"
    available = {"CPU": node.cpus}
    if "GPU" in per_rank:
        available["GPU"] = node.gpus
    return f"node {node.address} has {_format_resources(available)}: room for {islands}"


def _format_resources(resources: Mapping[str, float]) -> str:
    return " + ".join(f"{amount:g} {name}" for name, amount in sorted(resources.items()))


def assign_ranks(slots: Iterable[SlotFacts], dims: ParallelDims) -> tuple[RankPlace, ...]:
    """Returns the rank map, by rank.

    Islands are sorted by NVLink domain, node and GPU; each is one tensor-parallel group
    of neighbouring ranks. A pure function of the reported facts, so a restart on the
    same nodes yields the same map.

    Raises PlacementError when the slots are not exactly one world, or an island is not on
    one node.
    """
    reported = list(slots)
    by_slot = {facts.slot: facts for facts in reported}
    # A duplicate or missing slot would shift every rank after it.
    if len(by_slot) != len(reported) or len(reported) != dims.world_size:
        raise PlacementError(
            f"{len(reported)} workers reported for a world of {dims.world_size} ranks"
        )
    islands: dict[int, list[SlotFacts]] = {}
    for facts in reported:
        islands.setdefault(facts.bundle, []).append(facts)
    for bundle, members in islands.items():
        _check_island(bundle, members, dims.tp)
        members.sort(key=_device_key)
    ordered = sorted(islands.values(), key=_island_key)
    # The n-th island becomes the n-th tensor-parallel group, its devices in TP order.
    facts_of: dict[int, SlotFacts] = {}
    for members, group in zip(ordered, dims.groups(["tp"]), strict=True):
        for rank in group:
            facts_of[rank] = members[dims.coordinates(rank)["tp"]]
    places = _with_local_ranks(facts_of, dims)
    # True by construction, but checked: NCCL would hang silently with a wrong map.
    assert_groups_local(places, dims)
    return places


def _check_island(bundle: int, members: list[SlotFacts], size: int) -> None:
    if len(members) != size:
        raise PlacementError(
            f"bundle {bundle} has {len(members)} workers, a tensor-parallel group needs {size}"
        )
    addresses: dict[str, str] = {}
    gpus: set[str | int] = set()
    shared_gpu: str | int | None = None
    for facts in members:
        addresses[facts.node_id] = facts.address
        # An index is only unique on its node; the UUID is, where Ray reports one.
        gpu = facts.gpu_uuid or facts.gpu
        if gpu is None:
            continue
        if gpu in gpus:
            shared_gpu = gpu
        gpus.add(gpu)
    if len(addresses) != 1:
        nodes = ", ".join(sorted(addresses.values()))
        raise PlacementError(f"bundle {bundle} lies on several nodes: {nodes}")
    if shared_gpu is not None:
        address = members[0].address
        raise PlacementError(
            f"bundle {bundle}: several workers report GPU {shared_gpu} on node {address}"
        )


def _island_key(members: Sequence[SlotFacts]) -> tuple[object, ...]:
    """Sorts islands by domain, numeric address and first device."""
    first = members[0]
    numbers: tuple[int, ...] = ()
    parts = first.address.split(".")
    # 10.0.0.9 comes before 10.0.0.10; host names have no numeric order.
    if all(part.isdigit() for part in parts):
        numbers = tuple(int(part) for part in parts)
    return first.domain, numbers, first.address, first.node_id, _device_key(first)


def _device_key(facts: SlotFacts) -> tuple[int, int]:
    return facts.gpu or 0, facts.slot


def _with_local_ranks(
    facts_of: Mapping[int, SlotFacts], dims: ParallelDims
) -> tuple[RankPlace, ...]:
    """Numbers the ranks of each node, and the nodes in order of their first rank."""
    ranks_on_node = Counter(facts.node_id for facts in facts_of.values())
    node_ranks: dict[str, int] = {}
    next_local_rank: Counter[str] = Counter()
    places = []
    for rank in sorted(facts_of):
        facts = facts_of[rank]
        # Nodes are numbered in the order of their lowest rank, as torchrun does.
        node_ranks.setdefault(facts.node_id, len(node_ranks))
        place = RankPlace(
            rank=rank,
            slot=facts.slot,
            bundle=facts.bundle,
            node_id=facts.node_id,
            address=facts.address,
            gpu=facts.gpu,
            pid=facts.pid,
            local_rank=next_local_rank[facts.node_id],
            local_world_size=ranks_on_node[facts.node_id],
            node_rank=node_ranks[facts.node_id],
            coordinates=dims.coordinates(rank),
            local_dir=facts.local_dir,
        )
        next_local_rank[facts.node_id] += 1
        places.append(place)
    return tuple(places)


def assert_groups_local(places: Sequence[RankPlace], dims: ParallelDims) -> None:
    """Checks that every tensor-parallel group is on one node, before any collective.

    Raises PlacementError with the group.
    """
    node_of = {place.rank: place.node_id for place in places}
    for group in dims.groups(["tp"]):
        first = node_of[group[0]]
        for rank in group:
            if node_of[rank] != first:
                raise PlacementError(
                    f"tensor-parallel group {list(group)} lies on several nodes"
                )
