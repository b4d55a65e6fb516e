"""Counts collectives and their bytes by axis and kind.

Must not know: which layer sends what.
"""

from dataclasses import dataclass, field
from typing import Literal

from megatron_ray.parallel_dims import ParallelDims

Axis = Literal[
    "tp",
    "cp",
    "pp",
    "dp",
    "shard",
    "ep",
    "etp",
    "edp",
    "embedding",
    "tokens",
    "world",
    "sync",
]
"""Process groups. `dp` are the replicas of dense parameters, dp x cp; `shard` those of them
that share one copy under ZeRO-3; `edp` the replicas of an expert; `tokens` the ranks that
share a microbatch, tp x cp; `embedding` the two stages with tied word embeddings; `world`
all ranks that take a step together; `sync` those in the same place of every replica group,
while all others are within one."""
Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]


@dataclass
class Tally:
    """Numbers of collectives and their bytes, by axis and kind.

    Groups of one rank send nothing and are left out.
    """

    sizes: dict[Axis, int]
    """Ranks of each group."""
    operations: dict[tuple[Axis, Kind], int] = field(default_factory=dict)
    """Number of collectives."""
    bytes: dict[tuple[Axis, Kind], int] = field(default_factory=dict)
    """Bytes of all those collectives together."""

    def add(self, axis: Axis, kind: Kind, size: int, times: int = 1) -> None:
        """Adds `times` collectives of `size` bytes each."""
        if self.sizes[axis] > 1 and times and size:
            self._count(axis, kind, times, times * size)

    def add_all(self, other: "Tally", times: int = 1) -> None:
        """Adds everything in another tally, `times` over."""
        for (axis, kind), size in other.bytes.items():
            operations = other.operations[axis, kind]
            self._count(axis, kind, times * operations, times * size)

    def _count(self, axis: Axis, kind: Kind, operations: int, size: int) -> None:
        key = (axis, kind)
        self.operations[key] = self.operations.get(key, 0) + operations
        self.bytes[key] = self.bytes.get(key, 0) + size


def group_sizes(dims: ParallelDims, replica_groups: int = 1) -> dict[Axis, int]:
    """Returns the number of ranks of each group; `dims` are those of one replica group."""
    return {
        "tp": dims.tp,
        "cp": dims.cp,
        "pp": dims.pp,
        "dp": dims.size("dp", "cp"),
        "shard": dims.size("dp", "cp") // dims.zero_replicas,
        "ep": dims.ep,
        "etp": dims.expert_tp,
        "edp": dims.expert_dp,
        "embedding": 2 if dims.pp > 1 else 1,
        "tokens": dims.size("tp", "cp"),
        "world": dims.world_size,
        "sync": replica_groups,
    }
