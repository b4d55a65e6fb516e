"""Orders islands so that ranks that exchange much are near each other.

Owns: which neighbouring ranks should share a node, and the order of islands by which
they do. Pure. Must not know: Ray, bundles, processes.

Ranks are numbered with tp first, then cp and the experts' axes, and pp last. So near
groups are blocks of neighbouring ranks, and pipeline stages are the blocks that cross
nodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any

from megatron_ray.parallel_dims import ParallelDims


@dataclass(frozen=True)
class PlacedIsland:
    """An island and where it is."""

    key: tuple[Any, ...]
    """Sorts islands by NVLink domain, address and device; different for each."""
    place: str
    """The node, or the NVLink domain, that it lies in."""


@dataclass(frozen=True)
class _Block:
    """Islands that get neighbouring ranks."""

    key: tuple[Any, ...]
    place: str | None
    """Where all of it lies; None: on several nodes."""
    islands: tuple[int, ...]


def near_sizes(dims: ParallelDims) -> tuple[int, ...]:
    """Returns how many neighbouring ranks should share a node where they fit.

    Ascending, each a multiple of the one before, and all above tp: ranks that share a
    sequence (tp x cp), ranks that share experts (etp x ep). An axis that `order` puts far
    away is left out.
    """
    sizes = set()
    for ranks in (
        dims.group_of(0, ("tp", "cp")),
        dims.experts.group_of(0, ("etp", "ep")),
    ):
        if ranks == tuple(range(len(ranks))):
            sizes.add(lcm(len(ranks), dims.tp))
    chain = [dims.tp]
    for size in sorted(sizes):
        if size > chain[-1] and size % chain[-1] == 0 and dims.world_size % size == 0:
            chain.append(size)
    return tuple(chain[1:])


def arrange(islands: Sequence[PlacedIsland], dims: ParallelDims) -> list[int]:
    """Returns the islands' indices in the order of their ranks.

    Each near block is filled from one node where a node has enough islands for it; what
    is left over is combined.
    """
    blocks = []
    for index, island in enumerate(islands):
        blocks.append(_Block(island.key, island.place, (index,)))
    blocks.sort(key=_key)
    size = dims.tp
    for larger in near_sizes(dims):
        blocks = _combined(blocks, larger // size)
        size = larger
    order = list[int]()
    for block in blocks:
        order += block.islands
    return order


def num_split(
    order: Sequence[int], islands: Sequence[PlacedIsland], dims: ParallelDims
) -> int:
    """Returns how many near blocks of an order lie on several nodes."""
    split = 0
    for size in near_sizes(dims):
        count = size // dims.tp
        for first in range(0, len(order), count):
            places = {islands[index].place for index in order[first : first + count]}
            split += len(places) > 1
    return split


def _combined(blocks: Sequence[_Block], count: int) -> list[_Block]:
    """Returns blocks of `count` of the given ones, of one place as far as possible."""
    by_place: dict[str, list[_Block]] = {}
    rest = []
    for block in blocks:
        if block.place is None:
            rest.append(block)
        else:
            by_place.setdefault(block.place, []).append(block)
    combined = []
    for members in by_place.values():
        whole = len(members) // count * count
        combined += _joined(members[:whole], count)
        rest += members[whole:]
    rest.sort(key=_key)
    combined += _joined(rest, count)
    return sorted(combined, key=_key)


def _joined(blocks: Sequence[_Block], count: int) -> list[_Block]:
    joined = []
    for first in range(0, len(blocks), count):
        members = blocks[first : first + count]
        places = {block.place for block in members}
        place = members[0].place
        if len(places) > 1:
            place = None
        islands: tuple[int, ...] = ()
        for block in members:
            islands += block.islands
        joined.append(_Block(members[0].key, place, islands))
    return joined


def _key(block: _Block) -> tuple[Any, ...]:
    return block.key
