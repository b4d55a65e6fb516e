"""Defines the degrees of the parallel axes, and which ranks form a group.

There are two grids, the dense one and that of experts. Placement, planning and the
process groups all use this module, so they cannot disagree. Pure Python. Must not know:
torch, nodes.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from megatron_ray.config.parallelism import ParallelismConfig

ORDER = ("tp", "cp", "ep", "dp", "pp")
"""Megatron's order of axes; the first axis varies fastest, so tp groups are neighbouring ranks."""


@dataclass(frozen=True)
class Grid:
    """An n-dimensional grid of ranks."""

    axes: tuple[tuple[str, int], ...]
    """(axis, size) pairs, the fastest-varying axis first."""

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Size by axis."""
        return dict(self.axes)

    @cached_property
    def strides(self) -> dict[str, int]:
        """Distance between neighbours along each axis."""
        strides = {}
        stride = 1
        for axis, size in self.axes:
            strides[axis] = stride
            stride *= size
        return strides

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return prod(self.sizes.values())

    def size(self, *axes: str) -> int:
        """Returns the number of ranks of a group that spans the axes."""
        size = 1
        for axis in axes:
            size *= self.sizes[axis]
        return size

    def coordinates(self, rank: int) -> dict[str, int]:
        """Returns a rank's index along each axis.

        Raises ValueError for a rank outside the world.
        """
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside a world of {self.world_size}")
        # A mixed-radix number with the first axis as the fastest digit.
        indices = {}
        for axis, size in self.axes:
            rank, indices[axis] = divmod(rank, size)
        return indices

    def rank_at(self, **coordinates: int) -> int:
        """Inverts `coordinates`; axes that are not given are at 0."""
        rank = 0
        for axis, index in coordinates.items():
            rank += index * self.strides[axis]
        return rank

    def group_of(self, rank: int, axes: Iterable[str]) -> tuple[int, ...]:
        """Returns the ranks that differ from `rank` only along `axes`, in rank order."""
        # Starts from the group's lowest rank, which is at 0 along its axes.
        group_axes = tuple(axes)
        indices = self.coordinates(rank)
        lowest = rank
        for axis in group_axes:
            lowest -= indices[axis] * self.strides[axis]
        return tuple(sorted(self._spread([lowest], group_axes)))

    def groups(self, axes: Iterable[str]) -> tuple[tuple[int, ...], ...]:
        """Returns every group along `axes`, ordered by its lowest rank.

        Each rank is in exactly one of them.
        """
        group_axes = tuple(axes)
        # The lowest rank of a group is at 0 along its axes, and at any index along the
        # others.
        other_axes = [axis for axis in self.sizes if axis not in group_axes]
        leaders = sorted(self._spread([0], other_axes))
        return tuple([self.group_of(leader, group_axes) for leader in leaders])

    def _spread(self, ranks: list[int], axes: Iterable[str]) -> list[int]:
        """Returns the ranks at all indices along the axes, given those at 0."""
        for axis in axes:
            spread = []
            for index in range(self.sizes[axis]):
                offset = index * self.strides[axis]
                spread += [rank + offset for rank in ranks]
            ranks = spread
        return ranks


@dataclass(frozen=True)
class ParallelDims:
    """Sizes of all axes.

    The dense grid has tp x cp x dp x pp ranks. Experts use the same ranks as another
    grid, etp x ep x edp x pp, where edp follows from the others.

    Raises ValueError when an axis is below 1, the order is invalid, or the two grids
    are incompatible.
    """

    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int | None = None
    """tp when not given."""
    order: tuple[str, ...] = ORDER
    """Order of the axes of both grids (Megatron's `--order`)."""
    cp_sizes: tuple[int, ...] | None = None
    """Context parallelism as a hierarchy, innermost first; one level when not given."""
    zero_replicas: int = 1
    """Copies of state that is sharded over dp x cp."""
    replica_groups: int = 1
    """Groups of neighbouring replicas that take steps by themselves; dp counts the replicas
    of all of them."""

    def __post_init__(self) -> None:
        self._check_axes()
        # The experts of each group are spread over its own ranks.
        self.of_group._check_expert_grid()

    def _check_axes(self) -> None:
        if sorted(self.order) != sorted(ORDER):
            raise ValueError(
                f"order {'-'.join(self.order)} must name each of {', '.join(ORDER)} once"
            )
        for axis in (*ORDER, "etp"):
            size = getattr(self, axis)
            if size is not None and size < 1:
                raise ValueError(f"{axis}={size} must be at least 1")
        if self.cp_sizes is not None and prod(self.cp_sizes) != self.cp:
            raise ValueError(
                f"hierarchical sizes {list(self.cp_sizes)} multiply to "
                f"{prod(self.cp_sizes)}, not to cp={self.cp}"
            )
        if self.replica_groups < 1 or self.dp % self.replica_groups:
            raise ValueError(
                f"replica_groups={self.replica_groups} must divide dp={self.dp}"
            )
        if self.size("dp", "cp") % self.zero_replicas:
            raise ValueError(
                f"zero_replicas={self.zero_replicas} must divide dp x cp = {self.dp} x {self.cp}"
            )

    def _check_expert_grid(self) -> None:
        inside = self.expert_tp * self.ep * self.pp
        if self.world_size % inside:
            raise ValueError(
                f"etp({self.expert_tp}) x ep({self.ep}) x pp({self.pp}) = {inside} must "
                "divide the world,"
                f" tp({self.tp}) x cp({self.cp}) x dp({self.dp}) x pp({self.pp}) = "
                f"{self.world_size} ranks"
            )
        # A pipeline stage must have the same ranks in both grids.
        if self.pp > 1 and self.dense.strides["pp"] != self.experts.strides["pp"]:
            raise ValueError(
                f"order {'-'.join(self.order)} puts the pipeline stages of dense layers "
                "and experts on different ranks, because"
                f" dp={self.dp} and edp={self.expert_dp} differ; let the order end with pp"
            )

    @classmethod
    def for_world(
        cls,
        world_size: int,
        *,
        tp: int = 1,
        cp: int = 1,
        pp: int = 1,
        dp: int | None = None,
        ep: int = 1,
        etp: int | None = None,
    ) -> "ParallelDims":
        """Returns the grid of a world; dp is derived, or checked if given.

        Raises ValueError with the whole product when the world does not factor.
        """
        # ep and etp arrange the same ranks differently, so they are not factors here.
        model = tp * cp * pp
        resolved = dp
        if resolved is None:
            resolved = world_size // model
        if model * resolved != world_size:
            raise ValueError(
                f"tp({tp}) x cp({cp}) x dp({dp or 'auto'}) x pp({pp}) does not make up a "
                f"world of {world_size} ranks"
            )
        return cls(tp=tp, cp=cp, dp=resolved, pp=pp, ep=ep, etp=etp)

    @classmethod
    def of(
        cls, parallel: ParallelismConfig, world_size: int | None = None
    ) -> "ParallelDims":
        """Returns the grid of a config.

        `world_size` is required, and checked, if the config's dp is not resolved.

        Raises ValueError when it is not given then, or does not factor.
        """
        dp = parallel.dp
        if dp == "auto":
            if world_size is None:
                raise ValueError("parallel.dp is not resolved")
            dp = cls.for_world(
                world_size, tp=parallel.tp, cp=parallel.cp, pp=parallel.pp
            ).dp
        return cls(
            tp=parallel.tp,
            cp=parallel.cp,
            dp=dp,
            pp=parallel.pp,
            ep=parallel.ep,
            etp=parallel.etp,
            order=tuple(parallel.order.split("-")),
            cp_sizes=parallel.hierarchical_cp_sizes,
            zero_replicas=parallel.zero_replicas,
            replica_groups=parallel.replica_groups,
        )

    @property
    def expert_tp(self) -> int:
        """Tensor parallel degree inside an expert."""
        # As in Megatron, experts use tp unless etp is set.
        if self.etp is None:
            return self.tp
        return self.etp

    @property
    def expert_dp(self) -> int:
        """Replicas of each expert."""
        return self.world_size // (self.expert_tp * self.ep * self.pp)

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.tp * self.cp * self.dp * self.pp

    @cached_property
    def dense(self) -> Grid:
        """The grid of everything but the experts: tp, cp, dp, pp."""
        sizes = {"tp": self.tp, "cp": self.cp, "dp": self.dp, "pp": self.pp}
        return Grid(tuple([(axis, sizes[axis]) for axis in self.order if axis in sizes]))

    @cached_property
    def experts(self) -> Grid:
        """The grid of the experts: etp, ep, edp, pp.

        Context-parallel ranks are ordinary replicas in this grid.
        """
        # Keyed by the corresponding axis of `order`.
        expert_axes = {
            "tp": ("etp", self.expert_tp),
            "ep": ("ep", self.ep),
            "dp": ("edp", self.expert_dp),
            "pp": ("pp", self.pp),
        }
        return Grid(
            tuple([expert_axes[axis] for axis in self.order if axis in expert_axes])
        )

    def size(self, *axes: str) -> int:
        """Returns the number of ranks of a dense group that spans the axes."""
        return self.dense.size(*axes)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Returns a rank's index along each axis of the dense grid."""
        return self.dense.coordinates(rank)

    def rank_at(self, **coordinates: int) -> int:
        """Inverse of `coordinates`; axes not named are at 0."""
        return self.dense.rank_at(**coordinates)

    def group_of(self, rank: int, axes: Iterable[str]) -> tuple[int, ...]:
        """Returns the ranks that differ only along dense `axes`, in rank order."""
        return self.dense.group_of(rank, axes)

    def groups(self, axes: Iterable[str]) -> tuple[tuple[int, ...], ...]:
        """Returns every dense group along `axes`, ordered by its lowest rank.

        Each rank is in exactly one of them.
        """
        return self.dense.groups(axes)

    @cached_property
    def of_group(self) -> "ParallelDims":
        """The grid of one replica group by itself; this one if there is a single group."""
        if self.replica_groups == 1:
            return self
        return replace(self, dp=self.dp // self.replica_groups, replica_groups=1)

    def replica_group_index(self, rank: int) -> int:
        """Returns which replica group a rank is in."""
        return self.coordinates(rank)["dp"] // self.of_group.dp

    def rank_in_group(self, rank: int) -> int:
        """Returns a rank's number in the grid of its replica group."""
        coordinates = self.coordinates(rank)
        coordinates["dp"] %= self.of_group.dp
        return self.of_group.rank_at(**coordinates)

    def rank_of(self, group_index: int, rank_in_group: int) -> int:
        """Inverts `replica_group_index` and `rank_in_group`."""
        coordinates = self.of_group.coordinates(rank_in_group)
        coordinates["dp"] += group_index * self.of_group.dp
        return self.rank_at(**coordinates)

    def sync_group_of(self, rank: int) -> tuple[int, ...]:
        """Returns the ranks in the same place of every replica group, in their order."""
        place = self.rank_in_group(rank)
        return tuple([self.rank_of(index, place) for index in range(self.replica_groups)])

    def embedding_group_of(self, rank: int) -> tuple[int, ...]:
        """Returns the first and last rank of a rank's pipeline, which tie embeddings.

        Only the rank itself on other stages and at pp=1.
        """
        stages = self.group_of(rank, ("pp",))
        ends = (stages[0], stages[-1])
        if len(stages) == 1 or rank not in ends:
            return (rank,)
        return ends

    def context_levels_of(self, rank: int) -> tuple[tuple[int, ...], ...]:
        """Returns a rank's context-parallel group as the hierarchy `cp_sizes`.

        Innermost level first: at level l the rank is one of cp_sizes[l] ranks.
        """
        return _levels_of(rank, self.group_of(rank, ("cp",)), self.cp_sizes or (self.cp,))

    def shard_levels_of(self, rank: int) -> tuple[tuple[int, ...], ...]:
        """Returns a rank's two groups of sharded state.

        The ranks that hold the same copy of the state, and those with the same shard of
        other copies.
        """
        # Copies are the outer level, so that weights are gathered among near ranks.
        group = self.group_of(rank, ("dp", "cp"))
        shards = len(group) // self.zero_replicas
        return _levels_of(rank, group, (shards, self.zero_replicas))


def _levels_of(
    rank: int, group: tuple[int, ...], sizes: tuple[int, ...]
) -> tuple[tuple[int, ...], ...]:
    """Splits a group into levels of these sizes, innermost first; returns the rank's."""
    # The group is itself a grid with axes of these `sizes`.
    levels = []
    index = group.index(rank)
    # Neighbours on a level are `stride` apart in the group.
    stride = 1
    for size in sizes:
        start = index - index // stride % size * stride
        levels.append(group[start : start + size * stride : stride])
        stride *= size
    return tuple(levels)
