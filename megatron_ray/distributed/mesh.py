"""Makes the process groups of one rank from its position in the grid.

Owns: turning ParallelDims into groups. Must not know: layers, Ray.

The mesh is always passed as an argument, because a wrong global group would silently
produce wrong numbers.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_ray.distributed import collectives, device
from megatron_ray.distributed.collectives import Group
from megatron_ray.distributed.device_kind import DeviceKind
from megatron_ray.distributed.interleaver import Interleaver
from megatron_ray.distributed.recording import name_groups
from megatron_ray.parallel_dims import ParallelDims


@dataclass(frozen=True)
class World:
    """This process's rank and device within the world."""

    rank: int
    world_size: int
    local_rank: int
    device: str
    """`cpu` or `cuda`."""


@dataclass(frozen=True)
class NcclOptions:
    """Options of the NCCL communicators of one axis."""

    min_ctas: int | None = None
    """Least number of thread blocks of a collective; None: chosen by NCCL."""
    max_ctas: int | None = None
    high_priority_stream: bool = False


@dataclass(frozen=True)
class ParallelMesh:
    """The process groups of one rank, and its index in them. A group of one is None."""

    dims: ParallelDims
    """Degrees of the whole world. Where it has several replica groups, all groups below
    but the world's and sync_group are within this rank's."""
    rank: int
    device: torch.device
    device_kind: DeviceKind
    """Decides which kernels run; by default the kind of the device."""
    interleaver: Interleaver
    """Interleaves two passes on the device."""
    world_group: Group
    step_group: Group
    """Ranks that take a step together: the world, or one of its replica groups."""
    sync_group: Group
    """Ranks with the same parameters in other replica groups."""
    tp_group: Group
    dp_group: Group
    """Ranks with other samples of the batch."""
    cp_group: Group
    """Ranks with other tokens of the same samples."""
    cp_levels: tuple[Group, ...]
    """The ranks of cp_group as a hierarchy, innermost groups first."""
    replica_group: Group
    """Ranks with the same dense parameters and other tokens: dp x cp."""
    shard_group: Group
    """Ranks of replica_group that together hold one copy of sharded state."""
    copy_group: Group
    """Ranks of replica_group with the same shard of another copy."""
    pp_group: Group
    embedding_group: Group
    """First and last stage of this rank's pipeline; None on ranks of other stages."""
    token_group: Group
    """Ranks that share the tokens of a microbatch: tp x cp."""
    ep_group: Group
    """Ranks with the other experts."""
    etp_group: Group
    """Ranks with other parts of the same experts."""
    expert_replica_group: Group
    """Ranks with the same experts: edp."""

    @classmethod
    def create(
        cls,
        dims: ParallelDims,
        world: World,
        timeout: timedelta | None = None,
        nccl: Mapping[str, NcclOptions] | None = None,
    ) -> "ParallelMesh":
        """Builds every group and runs one collective on each.

        `nccl` are options by axis (tp, cp, pp, dp, ep), without effect on gloo.
        The store is not needed afterwards, since each group has opened its connections.
        torch.distributed must be initialised with `world.world_size` ranks (not needed
        for a world of one). Raises ValueError when the degrees do not multiply to the
        world size.
        """
        if dims.world_size != world.world_size:
            raise ValueError(
                f"the layout needs {dims.world_size} ranks, the world has {world.world_size}"
            )
        torch_device = device.select(world.device, world.local_rank)
        rank = world.rank
        factory = _GroupFactory(timeout, nccl or {}, torch_device)
        # Every rank creates its groups in this order, because creation is collective among
        # the members.
        groups, cp_levels = _groups_within(dims, rank, factory)
        groups["sync_group"] = factory.get(dims.sync_group_of(rank), "sync")
        groups["world_group"] = None
        if world.world_size > 1:
            groups["world_group"] = dist.group.WORLD
        if dims.replica_groups == 1:
            groups["step_group"] = groups["world_group"]
        name_groups(_axis_names(groups, cp_levels))
        # Each group once, as axes may share a group, in the same order on all ranks.
        for group in dict.fromkeys((*groups.values(), *cp_levels)):
            collectives.barrier(group, torch_device)
        return cls(
            dims,
            rank,
            torch_device,
            device.kind_of(torch_device.type),
            Interleaver(torch_device),
            cp_levels=tuple(cp_levels),
            **groups,
        )

    @classmethod
    def single(cls, kind: str = "cpu") -> "ParallelMesh":
        """Returns the mesh of one rank, without any process group."""
        return cls.create(ParallelDims(), World(0, 1, 0, kind))

    def set_timeout(self, timeout: timedelta) -> None:
        """Changes the time after which a collective of any group fails."""
        groups: list[Group] = list(self.cp_levels)
        for field in fields(self):
            group = getattr(self, field.name)
            if isinstance(group, dist.ProcessGroup):
                groups.append(group)
        for group in dict.fromkeys(groups):
            collectives.set_timeout(group, timeout)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
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
        """Index along dp, over all replica groups."""
        return self.dims.coordinates(self.rank)["dp"]

    @property
    def cp_rank(self) -> int:
        """Index along cp."""
        return collectives.rank(self.cp_group)


def _groups_within(
    dims: ParallelDims, rank: int, factory: "_GroupFactory"
) -> tuple[dict[str, Group], list[Group]]:
    """Makes the groups within a rank's replica group, and the levels of its cp group."""
    grid = dims.of_group
    place = dims.rank_in_group(rank)
    index = dims.replica_group_index(rank)

    def make(places: Iterable[int], name: str) -> Group:
        return factory.get(tuple([dims.rank_of(index, each) for each in places]), name)

    cp_levels = []
    for level in grid.context_levels_of(place):
        cp_levels.append(make(level, "cp level"))
    shard_places, copy_places = grid.shard_levels_of(place)
    groups = {
        "shard_group": make(shard_places, "shard level"),
        "copy_group": make(copy_places, "shard level"),
        "tp_group": make(grid.group_of(place, ("tp",)), "tp"),
        "dp_group": make(grid.group_of(place, ("dp",)), "dp"),
        "cp_group": make(grid.group_of(place, ("cp",)), "cp"),
        "replica_group": make(grid.group_of(place, ("dp", "cp")), "replica"),
        "pp_group": make(grid.group_of(place, ("pp",)), "pp"),
        "embedding_group": make(grid.embedding_group_of(place), "embedding"),
        "token_group": make(grid.group_of(place, ("tp", "cp")), "token"),
        "ep_group": make(grid.experts.group_of(place, ("ep",)), "ep"),
        "etp_group": make(grid.experts.group_of(place, ("etp",)), "etp"),
        "expert_replica_group": make(grid.experts.group_of(place, ("edp",)), "edp"),
    }
    # One group makes up the world, which has its process group already.
    if dims.replica_groups > 1:
        groups["step_group"] = make(range(grid.world_size), "step")
    return groups, cp_levels


def _axis_names(
    groups: Mapping[str, Group], cp_levels: Sequence[Group]
) -> dict[str, Group]:
    """Returns the groups by the names that messages use, the plainest first."""
    names: dict[str, Group] = {}
    # A group of several axes is best known by one of the first.
    for field in ("tp_group", "pp_group", "cp_group", "dp_group", "ep_group", *groups):
        names[field.removesuffix("_group")] = groups[field]
    for level, group in enumerate(cp_levels):
        names[f"cp level {level}"] = group
    return names


_AXES = {
    "tp": "tp",
    "token": "tp",
    "cp": "cp",
    "cp level": "cp",
    "pp": "pp",
    "embedding": "pp",
    "dp": "dp",
    "replica": "dp",
    "shard level": "dp",
    "edp": "dp",
    "step": "dp",
    "sync": "dp",
    "ep": "ep",
    "etp": "ep",
}
"""The axis whose options a group has, by the group's name."""


class _GroupFactory:
    """Creates only the groups that contain this rank.

    So the work does not grow with the world. Axes with the same ranks share a group,
    because each group costs connections and memory.
    """

    def __init__(
        self,
        timeout: timedelta | None,
        nccl: Mapping[str, NcclOptions],
        torch_device: torch.device,
    ) -> None:
        self._timeout = timeout
        self._nccl = nccl
        self._device = torch_device
        self._groups: dict[tuple[int, ...], Group] = {}

    def get(self, members: tuple[int, ...], name: str) -> Group:
        """Returns the group of these ranks; None for a single rank."""
        if len(members) == 1:
            return None
        # Without use_local_synchronization every rank of the world would have to create
        # every group.
        if members not in self._groups:
            self._groups[members] = dist.new_group(
                list(members),
                timeout=self._timeout,
                pg_options=self._options(_AXES[name]),
                group_desc=name,
                use_local_synchronization=True,
            )
        return self._groups[members]

    def _options(self, axis: str) -> Any | None:
        """Returns torch's options for a new group; None for the defaults."""
        chosen = self._nccl.get(axis, NcclOptions())
        if self._device.type != "cuda" or chosen == NcclOptions():
            return None
        # Absent from builds of torch without CUDA. New for each group, because torch writes
        # the group's ranks into it.
        options = dist.ProcessGroupNCCL.Options(
            is_high_priority_stream=chosen.high_priority_stream
        )
        # Set here too, because torch warns of a timeout that differs from the group's.
        if self._timeout is not None:
            options._timeout = self._timeout
        if chosen.min_ctas is not None:
            options.config.min_ctas = chosen.min_ctas
        if chosen.max_ctas is not None:
            options.config.max_ctas = chosen.max_ctas
        return options
