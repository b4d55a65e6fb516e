"""Describes the tensor-parallel group of a layer."""

from dataclasses import dataclass

from megatron_ray.distributed import collectives
from megatron_ray.distributed.collectives import Group
from megatron_ray.tensor_parallel.overlap import TokenOverlap


@dataclass(frozen=True)
class TensorParallel:
    """The ranks that share the weights of a layer; one rank by default."""

    group: Group = None
    size: int = 1
    rank: int = 0
    """This rank's index in the group."""
    sequence_parallel: bool = False
    """Whether activations between these layers are split along the tokens."""
    overlap: TokenOverlap | None = None
    """Sends these tokens while products of others are computed."""

    @classmethod
    def of_group(
        cls,
        group: Group,
        *,
        sequence_parallel: bool = False,
        overlap: TokenOverlap | None = None,
    ) -> "TensorParallel":
        """Describes a live process group, or one rank where it is None."""
        return cls(
            group,
            collectives.size(group),
            collectives.rank(group),
            sequence_parallel,
            overlap,
        )

    @property
    def sequence_group(self) -> Group:
        """The group over which tokens are gathered and scattered.

        None without sequence parallelism; these collectives are the identity then.
        """
        if self.sequence_parallel:
            return self.group
        return None
