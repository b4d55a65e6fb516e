"""This rank's place in the grid and its live process groups.

Owns: turning ParallelDims into groups. Must not know: layers, Ray.

The mesh is passed as an argument, always: a group read from a module's global once gave
wrong numbers with no error elsewhere.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_ray.distributed import collectives, device
from megatron_ray.distributed.collectives import Group
from megatron_ray.distributed.device_kind import DeviceKind
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
    device_kind: DeviceKind
    """Decides which kernels run; the device's own, unless it is replaced."""
    world_group: Group
    tp_group: Group
    dp_group: Group
    """Who has other samples of the batch."""
    cp_group: Group
    """Who has other tokens of the same samples."""
    cp_levels: tuple[Group, ...]
    """The same ranks as a hierarchy, innermost groups first."""
    replica_group: Group
    """Who has the same dense parameters and other tokens: dp x cp."""
    shard_group: Group
    """Those of them that share one copy of sharded state."""
    copy_group: Group
    """Those of them with the same shard of another copy."""
    pp_group: Group
    embedding_group: Group
    """First and last stage of this rank's pipeline, on those two."""
    token_group: Group
    """Who shares the tokens of a microbatch: tp x cp."""
    ep_group: Group
    """Who has the other experts."""
    etp_group: Group
    """Who has other parts of the same experts."""
    expert_replica_group: Group
    """Who has the same experts: edp."""

    @classmethod
    def create(
        cls, dims: ParallelDims, world: World, timeout: timedelta | None = None
    ) -> "ParallelMesh":
        """Builds every group and runs one collective on each, so that the store may die
        afterwards.

        torch.distributed must be initialised with `world.world_size` ranks (not needed
        for a world of one). Raises ValueError when the degrees do not make up the
        world.
        """
        if dims.world_size != world.world_size:
            raise ValueError(
                f"the layout needs {dims.world_size} ranks, the world has {world.world_size}"
            )
        chosen = device.select(world.device, world.local_rank)
        rank = world.rank
        groups = _Groups(timeout)
        cp_levels = tuple(
            groups.get(level, "cp level") for level in dims.context_levels_of(rank)
        )
        shard, copy = (
            groups.get(level, "shard level") for level in dims.shard_levels_of(rank)
        )
        found = {
            "world_group": dist.group.WORLD if world.world_size > 1 else None,
            "tp_group": groups.get(dims.group_of(rank, ("tp",)), "tp"),
            "dp_group": groups.get(dims.group_of(rank, ("dp",)), "dp"),
            "cp_group": groups.get(dims.group_of(rank, ("cp",)), "cp"),
            "replica_group": groups.get(dims.group_of(rank, ("dp", "cp")), "replica"),
            "shard_group": shard,
            "copy_group": copy,
            "pp_group": groups.get(dims.group_of(rank, ("pp",)), "pp"),
            "embedding_group": groups.get(dims.embedding_group_of(rank), "embedding"),
            "token_group": groups.get(dims.group_of(rank, ("tp", "cp")), "token"),
            "ep_group": groups.get(dims.experts.group_of(rank, ("ep",)), "ep"),
            "etp_group": groups.get(dims.experts.group_of(rank, ("etp",)), "etp"),
            "expert_replica_group": groups.get(
                dims.experts.group_of(rank, ("edp",)), "edp"
            ),
        }
        for group in dict.fromkeys((*found.values(), *cp_levels)):
            collectives.barrier(group, chosen)
        kind = device.kind_of(chosen.type)
        return cls(dims, world.rank, chosen, kind, cp_levels=cp_levels, **found)

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

    @property
    def cp_rank(self) -> int:
        """Index along cp."""
        return collectives.rank(self.cp_group)


class _Groups:
    """A rank makes the groups it is in and no others, in the same order of axes as
    everybody: work that does not grow with the world. Axes that come down to the same
    ranks share a group: each costs connections and memory.
    """

    def __init__(self, timeout: timedelta | None) -> None:
        self._timeout = timeout
        self._known: dict[tuple[int, ...], Group] = {}

    def get(self, members: tuple[int, ...], name: str) -> Group:
        """The group of these ranks, this one among them; None where it would be alone."""
        if len(members) == 1:
            return None
        if members not in self._known:
            self._known[members] = dist.new_group(
                list(members),
                timeout=self._timeout,
                group_desc=name,
                use_local_synchronization=True,
            )
        return self._known[members]
