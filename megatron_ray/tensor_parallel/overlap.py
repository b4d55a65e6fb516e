"""Overlaps the communication of tokens with the products that need it.

Tokens are split over a group (sequence parallelism). A product of the tokens of all ranks
is cut into one per rank (Wang et al. 2023, Overlap Communication with Dependent
Computation via Decomposition). That of a rank's own tokens runs while those of others
arrive, and sums of one rank's tokens are sent while those of the next are computed. A
rank sends as many bytes as in an all-gather or a reduce-scatter, in size - 1 messages, or
copies them from the memory of one GPU to that of another. Must not know: layers, operands
other than tokens, whether GPUs can read each other's memory.

Shapes: T tokens, t of each rank, I inputs, O outputs.
"""

from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from megatron_ray.distributed import collectives
from megatron_ray.distributed.collectives import DONE, Pending


class TokenProduct(Protocol):
    """A product in which each row depends on the same row of its operand only."""

    def __call__(self, rows: Tensor, /, *, out: Tensor | None = None) -> Tensor:
        """Returns the product of some rows, in `out` if it is passed."""
        ...


class TokenOverlap(Protocol):
    """Products whose tokens are communicated meanwhile."""

    def gather_and_multiply(
        self, product: TokenProduct, tokens_tI: Tensor, width: int
    ) -> tuple[Tensor, Tensor]:
        """Returns the tokens of all ranks [T, I], and their products [T, O], `width` wide."""
        ...

    def multiply_and_reduce_scatter(
        self, product: TokenProduct, inputs_TI: Tensor, width: int
    ) -> Tensor:
        """Returns the sum over ranks of this rank's products [T, O], `width` wide: [t, O].

        A rank adds what others send to its own product in the order of ranks, so the sums
        are those of the reduce-scatter on CPU.
        """
        ...


class MessageOverlap:
    """Sends tokens to other ranks as messages."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def gather_and_multiply(
        self, product: TokenProduct, tokens_tI: Tensor, width: int
    ) -> tuple[Tensor, Tensor]:
        """Returns the tokens of all ranks [T, I], and their products [T, O], `width` wide.

        Tokens go around a ring: each rank passes on what it multiplies.
        """
        size = self._group.size()
        rank = self._group.rank()
        gathered_TI = tokens_tI.new_empty((size * tokens_tI.shape[0], tokens_tI.shape[1]))
        output_TO = gathered_TI.new_empty((gathered_TI.shape[0], width))
        blocks = gathered_TI.chunk(size)
        outputs = output_TO.chunk(size)
        blocks[rank].copy_(tokens_tI)
        arriving: Pending = DONE
        for hop in range(size):
            source = (rank - hop) % size
            arriving.wait()
            # Before the product, because on CUDA a transfer waits for all work before it.
            if hop + 1 < size:
                arriving = collectives.start_exchange(
                    blocks[source],
                    (rank + 1) % size,
                    blocks[source - 1],
                    (rank - 1) % size,
                    self._group,
                )
            product(blocks[source], out=outputs[source])
        return gathered_TI, output_TO

    def multiply_and_reduce_scatter(
        self, product: TokenProduct, inputs_TI: Tensor, width: int
    ) -> Tensor:
        """Returns the sum over ranks of this rank's products [T, O]: [t, O]."""
        size = self._group.size()
        rank = self._group.rank()
        inputs = inputs_TI.chunk(size)
        arriving: dict[int, tuple[Tensor, Pending]] = {}
        for distance in range(1, size):
            receiver = (rank + distance) % size
            sender = (rank - distance) % size
            outgoing = product(inputs[receiver])
            incoming = outgoing.new_empty(outgoing.shape)
            exchange = collectives.start_exchange(
                outgoing, receiver, incoming, sender, self._group
            )
            arriving[sender] = (incoming, exchange)
        # Own tokens last, because no other rank waits for them.
        total_tO = product(inputs[rank])
        for sender in sorted(arriving):
            incoming, exchange = arriving[sender]
            exchange.wait()
            total_tO.add_(incoming)
        return total_tO
