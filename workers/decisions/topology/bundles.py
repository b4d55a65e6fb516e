"""Decides the bundles in which a job's resources are requested from Ray.

Owns: how many ranks a bundle has, and which NVLink domain each bundle is for. Pure. Must
not know: Ray, what the ranks are.

Ray never spreads a bundle over nodes.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from workers.decisions.topology.node_rules import domain_label, type_resources
from workers.decisions.topology.room import (
    Demand,
    FreeNode,
    Shape,
    max_islands,
    reserve,
    shape_of,
)
from workers.protocol.wire import NodeInfo


@dataclass(frozen=True)
class Bundle:
    """Resources requested on one node, and the slots (workers) that use them."""

    index: int
    resources: dict[str, float]
    slots: tuple[int, ...]
    selector: Mapping[str, str] = field(default_factory=dict)
    """Ray's conditions for the node's labels."""


def bundle_size(
    usable: Sequence[NodeInfo], demand: Demand, world_size: int, near: Sequence[int]
) -> int:
    """Returns the ranks of each bundle.

    A bundle is an island, or a part of one where islands share an NVLink domain. It is
    as large as one of `near`, ascending, if all ranks find room in such bundles now: so
    the wish for nearness never delays a job.
    """
    shape = shape_of(usable, demand)
    if shape.domain_label is not None:
        return shape.part
    # Where nothing is known to be free, the choice of nodes is Ray's.
    free = _free(usable)
    for size in reversed(near):
        larger = replace(demand, island=size)
        if max_islands(free, larger, Shape(size)) * size >= world_size:
            return size
    return demand.island


def make_bundles(
    usable: Sequence[NodeInfo],
    demand: Demand,
    world_size: int,
    size: int,
    selector: Mapping[str, str],
) -> tuple[Bundle, ...]:
    """Returns the bundles of a job, with consecutive slots.

    `selector` are Ray's conditions for each of them, which only `usable` nodes meet.
    """
    resources = {name: amount * size for name, amount in demand.per_rank.items()}
    resources |= type_resources(usable, demand.rules)
    selectors = [selector] * (world_size // size)
    if size < demand.island:
        selectors = _in_domains(usable, demand, size, selectors)
    bundles = []
    for index, conditions in enumerate(selectors):
        slots = range(index * size, (index + 1) * size)
        bundles.append(Bundle(index, resources, tuple(slots), conditions))
    return tuple(bundles)


def common_domain(
    usable: Sequence[NodeInfo], demand: Demand, world_size: int, size: int
) -> str | None:
    """Returns the label of the NVLink domain that all bundles must share; None if none.

    Ray chooses the domain then. Where one cannot hold them all, bundles name theirs.
    """
    if size >= demand.island:
        return None
    label = domain_label(usable)
    if label is None or not _fits_one_domain(
        usable, demand, world_size, Shape(size, label)
    ):
        return None
    return label


def _in_domains(
    usable: Sequence[NodeInfo],
    demand: Demand,
    size: int,
    selectors: Sequence[Mapping[str, str]],
) -> list[Mapping[str, str]]:
    """Returns the selectors with a domain for each bundle, unless all fit into any one."""
    label = domain_label(usable)
    shape = Shape(size, label)
    world_size = size * len(selectors)
    if label is None or _fits_one_domain(usable, demand, world_size, shape):
        return list(selectors)
    # What is free now is preferred; where that is unknown or too little, an empty cluster
    # is planned for, and the job waits.
    free = _free(usable)
    islands = world_size // demand.island
    ranks = reserve(free, demand, shape, islands)
    if ranks is None:
        empty = FreeNode.all_empty(usable)
        ranks = reserve(empty, demand, shape, islands)
    domains = []
    for node in usable:
        parts = (ranks or {}).get(node.node_id, 0) // size
        domains += [node.labels.get(label, "")] * parts
    # One domain after another, so that an island's bundles follow each other.
    chosen: list[Mapping[str, str]] = []
    for selector, domain in zip(selectors, sorted(domains), strict=False):
        chosen.append({**selector, label: domain})
    # Without room for all of them, the others wait for any domain.
    return [*chosen, *selectors[len(chosen) :]]


def _free(nodes: Iterable[NodeInfo]) -> list[FreeNode]:
    # Unknown use counts as full.
    return [FreeNode(node, dict(node.free or {})) for node in nodes]


def _fits_one_domain(
    usable: Sequence[NodeInfo], demand: Demand, world_size: int, shape: Shape
) -> bool:
    assert shape.domain_label is not None
    domains: dict[str, list[FreeNode]] = {}
    for node in usable:
        name = node.labels.get(shape.domain_label)
        if name is not None:
            domains.setdefault(name, []).append(FreeNode.empty(node))
    for members in domains.values():
        if max_islands(members, demand, shape) * demand.island >= world_size:
            return True
    return False
