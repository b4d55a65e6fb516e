"""Where ranks go.

Owns: bundles before placement, the rank map after it, and the reason when neither is
possible. Pure.

A bundle is an island, the ranks that must share NVLink (a tensor-parallel group). A
bundle cannot span nodes, so "TP inside a node" holds by construction. Ray orders
bundles as it likes: ranks are assigned from what the workers report. Must not know:
Ray, torch.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import floor
from typing import Literal

from pydantic import BaseModel, ConfigDict

from megatron_ray.parallel_dims import ParallelDims
from workers.exceptions import WorkersError
from workers.protocol.job import JobSpec
from workers.protocol.wire import NodeInfo

_EPSILON = 1e-6


class PlacementError(WorkersError):
    """The reported places do not make up the planned world; the text says which and
    how.
    """


@dataclass(frozen=True)
class Bundle:
    """One island: resources asked of one node, and the slots (workers) in it."""

    index: int
    resources: dict[str, float]
    slots: tuple[int, ...]


@dataclass(frozen=True)
class PlacementPlan:
    """What to ask Ray for, decided before anything is created."""

    accelerator: Literal["cpu", "gpu"]
    bundles: tuple[Bundle, ...]
    worker_resources: dict[str, float]
    """What one worker takes out of its bundle."""
    dims: ParallelDims
    room: int
    """Islands that the cluster could hold if it were empty."""
    node_reasons: tuple[str, ...] = ()
    """One line per node: how many islands it could hold, and what limits it."""
    avoid_nodes: tuple[str, ...] = ()
    """Node ids that must not be used."""

    @property
    def feasible(self) -> bool:
        """Whether the empty cluster has room; a busy one may still make the job wait."""
        return self.room >= len(self.bundles)

    @property
    def explanation(self) -> str:
        """Asked against available, node by node."""
        asked = (
            f"{len(self.bundles)} x {_words(self.bundles[0].resources)}, each on one node"
        )
        return f"asked for {asked}; the cluster could hold {self.room}: " + (
            "; ".join(self.node_reasons) or "it has no nodes"
        )


class SlotFacts(BaseModel):
    """What a worker reports about its place."""

    model_config = ConfigDict(frozen=True)

    slot: int
    bundle: int
    node_id: str
    address: str
    pid: int
    gpu: int | None = None
    """Index on its node; None on CPU, and for a process that Ray has given none."""
    standby: bool = False
    """Made to wait until a rank dies."""
    gpu_uuid: str | None = None
    domain: str = ""
    """NVLink domain, where nodes carry such a label."""
    local_dir: str = ""
    """Folder on its node for report and log files."""


class RankPlace(BaseModel):
    """One row of the rank map: who runs where, and where it stands in the grid."""

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
    spec: JobSpec, nodes: Sequence[NodeInfo], accelerator: str | None = None
) -> PlacementPlan:
    """Bundles for a resolved spec and what the cluster could hold of them.

    `accelerator` repeats an earlier decision.
    """
    alive = [node for node in nodes if node.alive]
    kind = accelerator or spec.resources.accelerator
    if kind == "auto":
        kind = "gpu" if any(node.gpus >= 1 for node in alive) else "cpu"
    dims = ParallelDims.of(spec.parallel)
    island = dims.tp
    per_rank = {"CPU": spec.resources.cpus_per_rank} | (
        {"GPU": 1.0} if kind == "gpu" else {}
    )
    resources = {name: amount * island for name, amount in per_rank.items()}
    bundles = tuple(
        Bundle(index, resources, tuple(range(index * island, (index + 1) * island)))
        for index in range(dims.world_size // island)
    )
    room = {node.node_id: _islands_on(node, resources) for node in alive}
    return PlacementPlan(
        accelerator="gpu" if kind == "gpu" else "cpu",
        bundles=bundles,
        worker_resources=per_rank,
        dims=dims,
        room=sum(room.values()),
        node_reasons=tuple(_reason(node, resources, room[node.node_id]) for node in alive),
        avoid_nodes=tuple(node.node_id for node in alive if node.storage_ok is False),
    )


def _islands_on(node: NodeInfo, resources: dict[str, float]) -> int:
    if node.storage_ok is False:
        return 0
    has = {"CPU": node.cpus, "GPU": node.gpus}
    return min(
        floor(has[name] / amount + _EPSILON)
        for name, amount in resources.items()
        if amount > 0
    )


def _reason(node: NodeInfo, resources: dict[str, float], islands: int) -> str:
    if node.storage_ok is False:
        return f"node {node.address} refused: it does not see the job storage"
    has = _words({"CPU": node.cpus} | ({"GPU": node.gpus} if "GPU" in resources else {}))
    return f"node {node.address} has {has}: room for {islands}"


def _words(resources: dict[str, float]) -> str:
    return " + ".join(f"{amount:g} {name}" for name, amount in sorted(resources.items()))


def assign_ranks(slots: Iterable[SlotFacts], dims: ParallelDims) -> tuple[RankPlace, ...]:
    """The rank map, by rank: islands sorted by NVLink domain, node and GPU, each one
    tensor-parallel group of neighbouring ranks.

    A pure function of the reported places, so it comes out the same after a restart in
    the same place. Raises PlacementError when the slots are not exactly one world, or
    an island is not on one node.
    """
    islands: dict[int, list[SlotFacts]] = {}
    found = list(slots)
    if len({facts.slot for facts in found}) != len(found) or len(found) != dims.world_size:
        raise PlacementError(
            f"{len(found)} workers reported for a world of {dims.world_size} ranks"
        )
    for facts in found:
        islands.setdefault(facts.bundle, []).append(facts)
    for bundle, members in islands.items():
        _check_island(bundle, members, dims.tp)
    order = sorted(
        islands.values(),
        key=lambda members: (
            *_node_key(members[0]),
            min(_device_key(facts) for facts in members),
        ),
    )
    placed = [facts for members in order for facts in sorted(members, key=_device_key)]
    ranked = {
        rank: facts
        for group, rank in _ranks_by_group(dims)
        for facts in [placed[group * dims.tp + dims.coordinates(rank)["tp"]]]
    }
    places = _with_local_ranks(ranked, dims)
    assert_groups_local(places, dims)
    return places


def _ranks_by_group(dims: ParallelDims) -> Iterable[tuple[int, int]]:
    return (
        (index, rank) for index, group in enumerate(dims.groups(["tp"])) for rank in group
    )


def _check_island(bundle: int, members: list[SlotFacts], size: int) -> None:
    if len(members) != size:
        raise PlacementError(
            f"bundle {bundle} has {len(members)} workers, a tensor-parallel group needs {size}"
        )
    nodes = sorted({facts.address for facts in members})
    if len({facts.node_id for facts in members}) != 1:
        raise PlacementError(f"bundle {bundle} lies on several nodes: {', '.join(nodes)}")
    gpus = [
        gpu
        for gpu, count in Counter(facts.gpu_uuid or facts.gpu for facts in members).items()
        if gpu is not None and count > 1
    ]
    if gpus:
        raise PlacementError(
            f"bundle {bundle}: several workers report GPU {gpus[0]} on node {nodes[0]}"
        )


def _node_key(facts: SlotFacts) -> tuple[str, tuple[int, ...], str, str]:
    parts = facts.address.split(".")
    numbers = (
        tuple(int(part) for part in parts) if all(part.isdigit() for part in parts) else ()
    )
    return facts.domain, numbers, facts.address, facts.node_id


def _device_key(facts: SlotFacts) -> tuple[int, int]:
    return (facts.gpu if facts.gpu is not None else 0), facts.slot


def _with_local_ranks(
    ranked: dict[int, SlotFacts], dims: ParallelDims
) -> tuple[RankPlace, ...]:
    sizes = Counter(facts.node_id for facts in ranked.values())
    node_ranks: dict[str, int] = {}
    used: Counter[str] = Counter()
    places = []
    for rank in sorted(ranked):
        facts = ranked[rank]
        node_ranks.setdefault(facts.node_id, len(node_ranks))
        place = RankPlace(
            rank=rank,
            slot=facts.slot,
            bundle=facts.bundle,
            node_id=facts.node_id,
            address=facts.address,
            gpu=facts.gpu,
            pid=facts.pid,
            local_rank=used[facts.node_id],
            local_world_size=sizes[facts.node_id],
            node_rank=node_ranks[facts.node_id],
            coordinates=dims.coordinates(rank),
            local_dir=facts.local_dir,
        )
        used[facts.node_id] += 1
        places.append(place)
    return tuple(places)


def assert_groups_local(places: Sequence[RankPlace], dims: ParallelDims) -> None:
    """Every tensor-parallel group on one node, before any collective.

    Raises PlacementError with the group.
    """
    node_of = {place.rank: place.node_id for place in places}
    for group in dims.groups(["tp"]):
        if len({node_of[rank] for rank in group}) != 1:
            raise PlacementError(
                f"tensor-parallel group {list(group)} lies on several nodes"
            )
