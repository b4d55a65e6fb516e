"""Degrees of the parallel axes and the arithmetic of ranks.

Owns: who is in a group with whom, in the dense and the expert grid.

Pure Python: placement, planning and the process groups all ask here, so they cannot
disagree. Must not know: torch, nodes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import prod

from megatron_ray.config.parallelism import ParallelismConfig

ORDER = ("tp", "cp", "ep", "dp", "pp")
"""Megatron's; the first axis varies fastest, so tp groups are neighbouring ranks."""
_EXPERT_AXES = {"tp": "etp", "ep": "ep", "dp": "edp", "pp": "pp"}


@dataclass(frozen=True)
class Grid:
    """Ranks in rows and columns: (axis, size) pairs, the axis that varies fastest
    first.
    """

    axes: tuple[tuple[str, int], ...]

    @cached_property
    def sizes(self) -> dict[str, int]:
        """By axis."""
        return dict(self.axes)

    @cached_property
    def strides(self) -> dict[str, int]:
        """Distance between neighbours along each axis."""
        found = {}
        stride = 1
        for axis, size in self.axes:
            found[axis] = stride
            stride *= size
        return found

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return prod(self.sizes.values())

    def size(self, *axes: str) -> int:
        """Ranks in a group spanning the axes."""
        return prod(self.sizes[axis] for axis in axes)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Axis -> index of a rank. Raises ValueError for one outside the world."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside a world of {self.world_size}")
        found = {}
        for axis, size in self.axes:
            rank, found[axis] = divmod(rank, size)
        return found

    def rank_at(self, **coordinates: int) -> int:
        """Inverse of `coordinates`; axes not named are at 0."""
        return sum(index * self.strides[axis] for axis, index in coordinates.items())

    def group_of(self, rank: int, axes: Iterable[str]) -> tuple[int, ...]:
        """Ranks that differ from `rank` only along `axes`, in rank order."""
        here = self.coordinates(rank)
        members = [rank]
        for axis in axes:
            base = [member - here[axis] * self.strides[axis] for member in members]
            members = [
                start + index * self.strides[axis]
                for start in base
                for index in range(self.sizes[axis])
            ]
        return tuple(sorted(members))

    def groups(self, axes: Iterable[str]) -> tuple[tuple[int, ...], ...]:
        """Every group along `axes`, ordered by its lowest rank; each rank is in exactly
        one.
        """
        wanted = tuple(axes)
        leaders = [0]
        for axis, size in self.axes:
            if axis not in wanted:
                leaders = [
                    leader + index * self.strides[axis]
                    for leader in leaders
                    for index in range(size)
                ]
        return tuple(self.group_of(leader, wanted) for leader in sorted(leaders))


@dataclass(frozen=True)
class ParallelDims:
    """Sizes of all axes. tp x cp x dp x pp ranks make up the dense grid; the experts
    live on the same ranks, cut another way: etp x ep x edp x pp, with edp what is left.
    `order` is of both (Megatron's `--order`).

    Raises ValueError when an axis is below 1, the order is none, or the two grids do
    not fit each other.
    """

    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int | None = None
    """tp when not given."""
    order: tuple[str, ...] = ORDER
    cp_sizes: tuple[int, ...] | None = None
    """Context parallelism as a hierarchy, innermost first; one level when not given."""
    zero_replicas: int = 1
    """Copies of state that is sharded over dp x cp."""

    def __post_init__(self) -> None:
        if sorted(self.order) != sorted(ORDER):
            raise ValueError(
                f"order {'-'.join(self.order)} must name each of {', '.join(ORDER)} once"
            )
        for axis in (*ORDER, "etp"):
            if (size := getattr(self, axis)) is not None and size < 1:
                raise ValueError(f"{axis}={size} must be at least 1")
        if self.cp_sizes is not None and prod(self.cp_sizes) != self.cp:
            raise ValueError(
                f"hierarchical sizes {list(self.cp_sizes)} multiply to "
                f"{prod(self.cp_sizes)}, not to cp={self.cp}"
            )
        if self.size("dp", "cp") % self.zero_replicas:
            raise ValueError(
                f"zero_replicas={self.zero_replicas} must divide dp x cp = {self.dp} x {self.cp}"
            )
        inside = self.expert_tp * self.ep * self.pp
        if self.world_size % inside:
            raise ValueError(
                f"etp({self.expert_tp}) x ep({self.ep}) x pp({self.pp}) = {inside} must "
                "divide the world,"
                f" tp({self.tp}) x cp({self.cp}) x dp({self.dp}) x pp({self.pp}) = "
                f"{self.world_size} ranks"
            )
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
        """Derives or checks dp.

        Raises ValueError with the whole product when the world does not factor.
        """
        model = tp * cp * pp
        resolved = world_size // model if dp is None else dp
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
        """The grid that a config describes; `world_size` is needed, and checked, where
        its dp is not resolved. Raises ValueError.
        """
        dp = None if parallel.dp == "auto" else parallel.dp
        if dp is None:
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
        )

    @property
    def expert_tp(self) -> int:
        """Tensor parallel degree inside an expert."""
        return self.tp if self.etp is None else self.etp

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
        """Of everything but the experts: tp, cp, dp, pp."""
        return Grid(
            tuple((axis, getattr(self, axis)) for axis in self.order if axis != "ep")
        )

    @cached_property
    def experts(self) -> Grid:
        """Of the experts: etp, ep, edp, pp.

        Context-parallel ranks are replicas like any other there.
        """
        sizes = {"etp": self.expert_tp, "ep": self.ep, "edp": self.expert_dp, "pp": self.pp}
        names = [_EXPERT_AXES[axis] for axis in self.order if axis in _EXPERT_AXES]
        return Grid(tuple((name, sizes[name]) for name in names))

    def size(self, *axes: str) -> int:
        """Ranks in a dense group spanning the axes."""
        return self.dense.size(*axes)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Axis -> index of a rank in the dense grid."""
        return self.dense.coordinates(rank)

    def rank_at(self, **coordinates: int) -> int:
        """Inverse of `coordinates`; axes not named are at 0."""
        return self.dense.rank_at(**coordinates)

    def group_of(self, rank: int, axes: Iterable[str]) -> tuple[int, ...]:
        """Ranks that differ from `rank` only along dense `axes`, in rank order."""
        return self.dense.group_of(rank, axes)

    def groups(self, axes: Iterable[str]) -> tuple[tuple[int, ...], ...]:
        """Every dense group along `axes`, ordered by its lowest rank; each rank is in
        exactly one.
        """
        return self.dense.groups(axes)

    def embedding_group_of(self, rank: int) -> tuple[int, ...]:
        """First and last stage of a rank's pipeline, who hold tied word embeddings; on
        the stages between, and at pp=1, the rank alone.
        """
        stages = self.group_of(rank, ("pp",))
        ends = (stages[0], stages[-1])
        return ends if rank in ends and len(stages) > 1 else (rank,)

    def context_levels_of(self, rank: int) -> tuple[tuple[int, ...], ...]:
        """A rank's context-parallel group as the hierarchy `cp_sizes`, innermost level
        first: at level l it is one of cp_sizes[l] ranks.
        """
        return _levels_of(rank, self.group_of(rank, ("cp",)), self.cp_sizes or (self.cp,))

    def shard_levels_of(self, rank: int) -> tuple[tuple[int, ...], ...]:
        """Who shares one copy of sharded state with a rank, and who has the same shard
        of another copy.
        """
        return _levels_of(
            rank,
            self.group_of(rank, ("dp", "cp")),
            (self.size("dp", "cp") // self.zero_replicas, self.zero_replicas),
        )


def _levels_of(
    rank: int, group: tuple[int, ...], sizes: tuple[int, ...]
) -> tuple[tuple[int, ...], ...]:
    levels = []
    here = group.index(rank)
    inner = 1
    for size in sizes:
        start = here - here // inner % size * inner
        levels.append(tuple(group[start + step * inner] for step in range(size)))
        inner *= size
    return tuple(levels)
