"""Overlaps copies between the memories of GPUs with the products of the tokens copied.

Each GPU of a group has a buffer that the others read (torch's symmetric memory). Copies run
on the copy engines of GPUs and leave their processors to the products, where messages of
NCCL are kernels. Numbers are those of messages. Must not know: layers, whether the GPUs
of a group can read each other's memory.

Shapes: T tokens, t of each rank, I inputs, O outputs.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName

from megatron_ray.tensor_parallel.overlap import TokenProduct


class GatherAndConsume(Protocol):
    """Gathers shards of all ranks, and calls a function with each of them as it arrives."""

    def __call__(
        self,
        shard: Tensor,
        shard_consumer: Callable[[Tensor, int], None],
        ag_out: Tensor,
        group_name: GroupName,
    ) -> None:
        """The function takes a shard and the rank that it is from."""


class ProduceAndScatter(Protocol):
    """Calls a function that writes a chunk for each rank, and copies it there."""

    def __call__(
        self,
        chunk_producer: Callable[[int, Tensor], None],
        output: Tensor,
        group_name: GroupName,
    ) -> None:
        """The function takes a rank and the memory for its chunk."""


class PipelinedCopies(NamedTuple):
    """The functions of torch that pipeline copies with products."""

    gather_and_consume: GatherAndConsume
    produce_and_scatter: ProduceAndScatter


class SymmetricMemoryOverlap:
    """Copies tokens between the memories of a group's GPUs; a `TokenOverlap`."""

    def __init__(self, group: dist.ProcessGroup, copies: PipelinedCopies) -> None:
        self._group = group
        self._copies = copies

    def gather_and_multiply(
        self, product: TokenProduct, tokens_tI: Tensor, width: int
    ) -> tuple[Tensor, Tensor]:
        """Returns the tokens of all ranks [T, I], and their products [T, O], `width` wide."""
        size = self._group.size()
        gathered_TI = tokens_tI.new_empty((size * tokens_tI.shape[0], tokens_tI.shape[1]))
        output_TO = gathered_TI.new_empty((gathered_TI.shape[0], width))
        outputs = output_TO.chunk(size)

        def multiply(rows: Tensor, source: int) -> None:
            product(rows, out=outputs[source])

        self._copies.gather_and_consume(
            tokens_tI.contiguous(), multiply, gathered_TI, self._group.group_name
        )
        return gathered_TI, output_TO

    def multiply_and_reduce_scatter(
        self, product: TokenProduct, inputs_TI: Tensor, width: int
    ) -> Tensor:
        """Returns the sum over ranks of this rank's products [T, O], `width` wide: [t, O]."""
        size = self._group.size()
        rank = self._group.rank()
        inputs = inputs_TI.chunk(size)
        received_TO = inputs_TI.new_empty((inputs_TI.shape[0], width))

        def multiply(receiver: int, memory: Tensor) -> None:
            product(inputs[receiver], out=memory)

        self._copies.produce_and_scatter(multiply, received_TO, self._group.group_name)
        # In the order in which messages are added.
        products = received_TO.chunk(size)
        total_tO = products[rank].clone()
        for source in range(size):
            if source != rank:
                total_tO.add_(products[source])
        return total_tO
