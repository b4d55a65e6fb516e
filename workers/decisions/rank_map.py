"""Assigns ranks to the processes that run on the placed bundles.

Owns: the rank map. Pure. Must not know: Ray, torch, how bundles are chosen.

The order of bundles in Ray is arbitrary, so ranks are assigned from what the workers
report of their nodes and devices.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import filterfalse
from operator import attrgetter
from typing import Any

from megatron_ray.parallel_dims import ParallelDims
from workers.decisions.placement import PlacementError, RankPlace, SlotFacts
from workers.decisions.topology.arrangement import PlacedIsland, arrange, num_split
from workers.decisions.topology.node_rules import address_key


def assign_ranks(
    slots: Iterable[SlotFacts],
    dims: ParallelDims,
    previous: Iterable[RankPlace] = (),
    *,
    size: int | None = None,
) -> tuple[RankPlace, ...]:
    """Returns the rank map, by rank.

    Islands get ranks so that neighbouring ranks are near each other: a pure function of
    the reported facts, so a restart on the same nodes yields the same map. Devices that
    had a rank in the `previous` map keep it, unless that would move near ranks apart.
    `size` is the number of ranks of a bundle, by default an island's.

    Raises PlacementError when the slots are not exactly one world, or an island is not on
    one node nor in one NVLink domain.
    """
    reported = list(slots)
    by_slot = {facts.slot: facts for facts in reported}
    # A duplicate or missing slot would shift every rank after it.
    if len(by_slot) != len(reported) or len(reported) != dims.world_size:
        raise PlacementError(
            f"{len(reported)} workers reported for a world of {dims.world_size} ranks"
        )
    islands = _islands(reported, dims.tp, size or dims.tp)
    groups = dims.groups(["tp"])
    earlier = _EarlierRanks(previous, groups)
    placed = list(map(_placed, islands))
    order = _stable_order(islands, placed, dims, earlier)
    # The n-th island becomes the n-th tensor-parallel group, its devices in TP order.
    facts_of: dict[int, SlotFacts] = {}
    for index, group in zip(order, groups, strict=True):
        members = earlier.in_order(islands[index], group)
        facts_of.update(zip(group, members, strict=True))
    places = _with_local_ranks(facts_of, dims)
    # True by construction, but checked: NCCL would hang silently with a wrong map.
    domains = dict(map(attrgetter("node_id", "domain"), reported))
    assert_groups_local(places, dims, domains)
    return places


class _EarlierRanks:
    """The ranks that devices had in the map of the attempt before."""

    def __init__(
        self, previous: Iterable[RankPlace], groups: Sequence[tuple[int, ...]]
    ) -> None:
        self._rank_at: dict[tuple[object, ...], int] = {}
        for place in previous:
            self._rank_at[_device(place)] = place.rank
        self._group_of: dict[int, int] = {}
        for index, group in enumerate(groups):
            for rank in group:
                self._group_of[rank] = index

    def group(self, island: Sequence[SlotFacts]) -> int | None:
        """Returns the index of the group that the island was; None if it was none."""
        indices = set()
        for facts in island:
            rank = self._rank_at.get(_device(facts))
            if rank is not None:
                indices.add(self._group_of.get(rank))
        if len(indices) == 1:
            return indices.pop()
        return None

    def in_order(
        self, island: Sequence[SlotFacts], group: Sequence[int]
    ) -> list[SlotFacts]:
        """Returns the island's devices in the order of a group's ranks."""
        members: dict[int, SlotFacts] = {}
        others = []
        for facts in island:
            rank = self._rank_at.get(_device(facts))
            if rank is not None and rank in group and rank not in members:
                members[rank] = facts
            else:
                others.append(facts)
        ordered = []
        for rank in group:
            ordered.append(members.get(rank) or others.pop(0))
        return ordered


def _device(item: SlotFacts | RankPlace) -> tuple[object, ...]:
    """Returns what stays the same of a rank's place when its process is replaced."""
    if item.gpu is not None:
        return item.node_id, "gpu", item.gpu
    return item.node_id, "slot", item.slot


def _stable_order(
    islands: Sequence[Sequence[SlotFacts]],
    placed: Sequence[PlacedIsland],
    dims: ParallelDims,
    earlier: _EarlierRanks,
) -> list[int]:
    """Returns the islands' indices in the order of their ranks."""
    fresh = arrange(placed, dims)
    kept: dict[int, int] = {}
    for index in fresh:
        group = earlier.group(islands[index])
        if group is not None:
            kept.setdefault(group, index)
    kept_islands = set(kept.values())
    others = filterfalse(kept_islands.__contains__, fresh)
    stable = []
    for group in range(len(fresh)):
        # Not the default of `get`, which would take one in every turn.
        stable.append(kept[group] if group in kept else next(others))
    # A rank that stays where it was may have its state at hand; but what is slow in every
    # step weighs more.
    if num_split(stable, placed, dims) <= num_split(fresh, placed, dims):
        return stable
    return fresh


def _islands(slots: Iterable[SlotFacts], tp: int, size: int) -> list[list[SlotFacts]]:
    """Returns the tensor-parallel groups, each with its devices in order."""
    bundles: dict[int, list[SlotFacts]] = {}
    for facts in slots:
        bundles.setdefault(facts.bundle, []).append(facts)
    islands = []
    parts: dict[str, list[list[SlotFacts]]] = {}
    for bundle, members in bundles.items():
        _check_bundle(bundle, members, size)
        members.sort(key=_device_key)
        if size < tp:
            parts.setdefault(members[0].domain, []).append(members)
        for first in range(0, len(members), tp):
            islands.append(members[first : first + tp])
    if size < tp:
        return _joined(parts, tp // size)
    return islands


def _joined(
    parts: Mapping[str, list[list[SlotFacts]]], count: int
) -> list[list[SlotFacts]]:
    """Returns islands of `count` parts that share an NVLink domain."""
    islands = []
    for domain, members in parts.items():
        if not domain or len(members) % count:
            raise PlacementError(
                f"{len(members)} bundles lie in NVLink domain {domain or 'none'}, a "
                f"tensor-parallel group needs {count}"
            )
        members.sort(key=_island_key)
        for first in range(0, len(members), count):
            island: list[SlotFacts] = []
            for part in members[first : first + count]:
                island += part
            islands.append(island)
    return islands


def _check_bundle(bundle: int, members: list[SlotFacts], size: int) -> None:
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


def _placed(island: Sequence[SlotFacts]) -> PlacedIsland:
    place = island[0].node_id
    # Parts of an island are sorted by node.
    if island[-1].node_id != place:
        place = f"domain {island[0].domain}"
    return PlacedIsland(_island_key(island), place)


def _island_key(island: Sequence[SlotFacts]) -> tuple[Any, ...]:
    """Sorts islands by domain, address and first device."""
    first = island[0]
    return first.domain, address_key(first.address), first.node_id, _device_key(first)


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


def assert_groups_local(
    places: Sequence[RankPlace],
    dims: ParallelDims,
    domains: Mapping[str, str] | None = None,
) -> None:
    """Checks before any collective that every tensor-parallel group shares NVLink.

    It is on one node, or in one NVLink domain; `domains` are those of nodes. Raises
    PlacementError with the group.
    """
    node_of = {place.rank: place.node_id for place in places}
    for group in dims.groups(["tp"]):
        first = node_of[group[0]]
        domain = (domains or {}).get(first, "")
        for rank in group:
            node = node_of[rank]
            is_shared = domain != "" and (domains or {}).get(node) == domain
            if node != first and not is_shared:
                raise PlacementError(
                    f"tensor-parallel group {list(group)} lies on several nodes"
                )
