"""Lists what a rank adds to sums over all parameters, so that each element counts once.

Owns: which of several copies of an element counts. Must not know: what is summed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ray.distributed import collectives
from megatron_ray.optimizer.partition import Piece, cut
from megatron_ray.optimizer.shard import OptimizerShard
from megatron_ray.optimizer.sharded import ShardedOptimizer

# fp32 is accurate enough for the norm of this many elements; their squares are summed in
# fp64.
_NORM_CHUNK = 4096


@dataclass(frozen=True)
class CountedPart:
    """A range of one logical parameter that this rank updates and counts."""

    name: str
    """Logical name of the parameter."""
    shard: OptimizerShard
    piece: Piece

    @property
    def main(self) -> Tensor:
        """The fp32 main parameters, flat, on the device."""
        return self.shard.main(self.piece)

    @property
    def gradient(self) -> Tensor:
        """The fp32 gradients, as a flat view."""
        return self.shard.gradient(self.piece)

    @property
    def state(self) -> Mapping[str, Tensor]:
        """The optimizer's state, flat, on the device."""
        kept = self.shard.state_of(self.piece)
        device = self.gradient.device
        return {name: flat.to(device) for name, flat in kept.items()}


def counted_parts(optimizer: ShardedOptimizer, tp_rank: int) -> Iterator[CountedPart]:
    """Yields the parts of this rank; those of all ranks have every element once.

    Padding is in no part.
    """
    for shard in optimizer.shards:
        if not counts_shard(shard):
            continue
        for piece in shard.pieces:
            parameter = piece.placed.parameter
            if not counts(parameter.owns_norm, parameter.tp_sharded, tp_rank):
                continue
            for part in parameter.parts:
                overlap = piece.overlap(part)
                if part.owns_norm and overlap is not None:
                    yield CountedPart(part.logical.name, shard, cut(piece, *overlap))


def counts_shard(shard: OptimizerShard) -> bool:
    """Returns whether this rank counts its shard of a group."""
    # Without ZeRO all replicas have all elements, so only the first one counts.
    return shard.sharded or collectives.rank(shard.group) == 0


def counts(owns_norm: bool, tp_sharded: bool, tp_rank: int) -> bool:
    """Returns whether this rank counts elements with these properties."""
    # The same holds for elements that are equal on all tp ranks, and for copies on two
    # pipeline stages or several tp ranks.
    return owns_norm and (tp_sharded or tp_rank == 0)


def sum_of_squares(flat: Tensor) -> Tensor:
    """Returns the fp64 sum of squares of a flat tensor, without an fp64 copy of it."""
    body = flat.numel() // _NORM_CHUNK * _NORM_CHUNK
    chunks = flat[:body].view(-1, _NORM_CHUNK)
    # Moments may be bf16.
    norms = torch.linalg.vector_norm(chunks, dim=1, dtype=torch.float32)
    total: Tensor = norms.double().square().sum() + flat[body:].double().square().sum()
    return total
