"""Degrees of the parallel axes and the arithmetic of ranks. Owns: who is in a group with whom.

Pure Python: placement, planning and the process groups all ask here, so they cannot disagree. Must not know: torch, nodes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

AXES = ("tp", "cp", "dp", "pp")


@dataclass(frozen=True)
class ParallelDims:
    """Sizes of the dense grid; the first axis of `order` varies fastest, so tp groups are neighbouring ranks.

    Expert axes fold into dp and join with the expert grid; until then the order is Megatron's tp-cp-ep-dp-pp without ep.
    """

    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1
    order: tuple[str, ...] = AXES

    def __post_init__(self) -> None:
        if sorted(self.order) != sorted(AXES):
            raise ValueError(f"order {self.order} must name each of {AXES} once")
        for axis in AXES:
            if self.size(axis) < 1:
                raise ValueError(f"{axis}={self.size(axis)} must be at least 1")

    @classmethod
    def for_world(cls, world_size: int, *, tp: int = 1, cp: int = 1, pp: int = 1, dp: int | None = None) -> "ParallelDims":
        """Derives or checks dp. Raises ValueError with the whole product when the world does not factor."""
        model = tp * cp * pp
        resolved = world_size // model if dp is None else dp
        if model * resolved != world_size:
            raise ValueError(f"tp({tp}) x cp({cp}) x dp({dp or 'auto'}) x pp({pp}) does not make up a world of {world_size} ranks")
        return cls(tp=tp, cp=cp, dp=resolved, pp=pp)

    def size(self, *axes: str) -> int:
        """Ranks in a group spanning the axes."""
        return prod(getattr(self, axis) for axis in axes)

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.size(*AXES)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Axis -> index of a rank."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside a world of {self.world_size}")
        found = {}
        for axis in self.order:
            rank, found[axis] = divmod(rank, self.size(axis))
        return found

    def rank_at(self, **coordinates: int) -> int:
        """Inverse of `coordinates`; axes not named are at 0."""
        rank = 0
        for axis in reversed(self.order):
            rank = rank * self.size(axis) + coordinates.get(axis, 0)
        return rank

    def group_of(self, rank: int, axes: Iterable[str]) -> tuple[int, ...]:
        """Ranks that differ from `rank` only along `axes`, in rank order."""
        here = self.coordinates(rank)
        members = [here]
        for axis in axes:
            members = [{**member, axis: index} for member in members for index in range(self.size(axis))]
        return tuple(sorted(self.rank_at(**member) for member in members))

    def groups(self, axes: Iterable[str]) -> tuple[tuple[int, ...], ...]:
        """Every group along `axes`, ordered by its lowest rank; each rank is in exactly one."""
        wanted = tuple(axes)
        others = [axis for axis in self.order if axis not in wanted]
        leaders: list[dict[str, int]] = [{}]
        for axis in reversed(others):
            leaders = [{**leader, axis: index} for leader in leaders for index in range(self.size(axis))]
        return tuple(sorted(self.group_of(self.rank_at(**leader), wanted) for leader in leaders))
