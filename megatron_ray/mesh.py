"""This rank's place in the grid and its live process groups. Owns: turning ParallelDims into groups. Must not know: layers, Ray.

The mesh is passed as an argument, always: a group read from a module's global once gave wrong numbers with no error elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_ray import collectives, device
from megatron_ray.collectives import Group
from megatron_ray.parallel_dims import ParallelDims


@dataclass(frozen=True)
class World:
    """Who this process is."""

    rank: int
    world_size: int
    local_rank: int
    device: str
    """`cpu` or `cuda`."""


@dataclass(frozen=True)
class ParallelMesh:
    """Coordinates and groups of one rank; a group of one rank is None."""

    dims: ParallelDims
    rank: int
    device: torch.device
    world_group: Group
    tp_group: Group
    dp_group: Group
    pp_group: Group = None
    embedding_group: Group = None
    """First and last stage of this rank's pipeline, on those two."""

    @classmethod
    def create(cls, dims: ParallelDims, world: World, timeout: timedelta | None = None) -> "ParallelMesh":
        """Builds every group and runs one collective on each, so that the store may die afterwards.

        torch.distributed must be initialised with `world.world_size` ranks (not needed for a world of one).
        Raises ValueError when the degrees do not make up the world.
        """
        if dims.world_size != world.world_size:
            raise ValueError(f"the layout needs {dims.world_size} ranks, the world has {world.world_size}")
        chosen = device.select(world.device, world.local_rank)
        tp, dp, pp = (_create_group(dims.groups((axis,)), world.rank, axis, timeout) for axis in ("tp", "dp", "pp"))
        embedding = _create_group(dims.embedding_groups(), world.rank, "embedding", timeout)
        everyone = dist.group.WORLD if world.world_size > 1 else None
        for group in (everyone, tp, dp, pp, embedding):
            collectives.barrier(group, chosen)
        return cls(dims, world.rank, chosen, everyone, tp, dp, pp, embedding)

    @classmethod
    def single(cls, kind: str = "cpu") -> "ParallelMesh":
        """One rank, no process group at all."""
        return cls.create(ParallelDims(), World(0, 1, 0, kind))

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.dims.world_size

    @property
    def tp_rank(self) -> int:
        """Index along tp."""
        return collectives.rank(self.tp_group)

    @property
    def pp_rank(self) -> int:
        """Index along pp."""
        return collectives.rank(self.pp_group)

    @property
    def dp_rank(self) -> int:
        """Index along dp."""
        return collectives.rank(self.dp_group)


def _create_group(groups: Sequence[Sequence[int]], rank: int, name: str, timeout: timedelta | None) -> Group:
    """Every rank must create every group, in the same order; returns the one this rank is in, None where it would be alone."""
    mine: Group = None
    for members in groups:
        if len(members) > 1:
            group = dist.new_group(list(members), timeout=timeout, group_desc=name)
            if rank in members:
                mine = group
    return mine
