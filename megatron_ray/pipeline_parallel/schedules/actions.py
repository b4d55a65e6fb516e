"""Describes the actions of a pipeline rank in a step as data.

Owns: the actions of a step, and the mapping of stages to ranks. Pure; must not know:
torch.

A schedule is one list of actions per pipeline rank. `orders` makes the lists of
computing actions, `lowering` adds sends and receives, the runner executes the lists and
`simulation` simulates them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, NamedTuple


class Op(IntEnum):
    """Kinds of action."""

    FORWARD = 0
    BACKWARD = 1
    """Computes gradients of input and weights."""
    BACKWARD_INPUT = 2
    BACKWARD_WEIGHT = 3
    SEND_FORWARD = 4
    RECV_FORWARD = 5
    SEND_BACKWARD = 6
    RECV_BACKWARD = 7

    @property
    def is_compute(self) -> bool:
        """Whether the action computes; other actions transfer data."""
        return self <= Op.BACKWARD_WEIGHT

    @property
    def is_send(self) -> bool:
        """Whether the action sends data to `peer`."""
        return self in (Op.SEND_FORWARD, Op.SEND_BACKWARD)


class Action(NamedTuple):
    """One entry of a rank's list.

    Sends and receives contain this rank's chunk that produces or uses the message.
    """

    op: Op
    chunk: int
    microbatch: int
    peer: int = -1
    """The other pipeline rank of a transfer; -1 for computing."""
    is_paired: bool = False
    """Whether a forward pass is interleaved with the backward pass that follows it in
    the list, which is of another microbatch. Both need their inputs at their begin, and
    their results are sent after both."""


Order = list[Action]
"""One rank's actions in order of execution."""


def in_units(order: Order) -> Iterator[Order]:
    """Yields the actions of a list, and those that are interleaved together."""
    unit: Order = []
    for action in order:
        unit.append(action)
        if not action.is_paired:
            yield unit
            unit = []


@dataclass(frozen=True)
class StageMap:
    """Maps pp x vpp stages to ranks, with `vpp` chunks per rank.

    `loop` (Megatron's interleaving): stage s is chunk s // pp of rank s % pp. `v` (Qi
    et al. 2024, ZB-V): the second half runs in reverse order of ranks, so that the
    first and the last stage are on rank 0.
    """

    pp: int
    vpp: int = 1
    kind: Literal["loop", "v"] = "loop"

    def __post_init__(self) -> None:
        if self.kind == "v" and self.vpp != 2:
            raise ValueError(f"stages in a V are two per rank, not vpp={self.vpp}")

    @property
    def num_stages(self) -> int:
        """Number of stages on all ranks."""
        return self.pp * self.vpp

    def stage(self, rank: int, chunk: int) -> int:
        """Returns the stage of a rank's chunk."""
        if self.kind == "v" and chunk == 1:
            return 2 * self.pp - 1 - rank
        return chunk * self.pp + rank

    def rank_and_chunk(self, stage: int) -> tuple[int, int]:
        """Returns the rank of a stage and the index of its chunk."""
        chunk, position = divmod(stage, self.pp)
        if self.kind == "v" and chunk == 1:
            return self.pp - 1 - position, 1
        return position, chunk
