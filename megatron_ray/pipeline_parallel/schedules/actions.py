"""What a pipeline rank does, as data.

Owns: the actions of a step and which rank holds which stage. Pure; must not know:
torch.

A schedule is one list of actions per pipeline rank. `orders` gives the computing ones;
`lowering` adds what is sent, received and reduced; the runner executes that very list
and `simulation` judges it.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, NamedTuple


class Op(IntEnum):
    """Kinds of action."""

    FORWARD = 0
    BACKWARD = 1
    """Gradients of input and weights at once."""
    BACKWARD_INPUT = 2
    BACKWARD_WEIGHT = 3
    SEND_FORWARD = 4
    RECV_FORWARD = 5
    SEND_BACKWARD = 6
    RECV_BACKWARD = 7
    REDUCE_GRADS = 8
    """A chunk's gradients are complete: their reduction over data-parallel ranks may
    begin."""
    UNSHARD = 9
    """A chunk's parameters are about to be used for the first time in the step (ZeRO-3
    gathers them)."""

    @property
    def is_compute(self) -> bool:
        """Whether it keeps the processor busy."""
        return self <= Op.BACKWARD_WEIGHT

    @property
    def is_send(self) -> bool:
        """Whether it gives something to `peer`."""
        return self in (Op.SEND_FORWARD, Op.SEND_BACKWARD)

    @property
    def is_receive(self) -> bool:
        """Whether it takes something from `peer`."""
        return self in (Op.RECV_FORWARD, Op.RECV_BACKWARD)


class Action(NamedTuple):
    """One entry of a rank's list.

    Sends name what they send, receives what they need it for, by this rank's own chunk.
    """

    op: Op
    chunk: int
    microbatch: int = -1
    """-1 for actions on a whole chunk."""
    peer: int = -1
    """Pipeline rank at the other end; -1 for what stays here."""


Order = list[Action]
"""One rank's actions, in the order in which it takes them."""


@dataclass(frozen=True)
class StageMap:
    """Which rank holds which stage, `vpp` of them each.

    `loop` (Megatron's interleaving): stage s is chunk s // pp of rank s % pp. `v` (Qi
    et al. 2024, ZB-V): the second half comes back, so that the first and the last stage
    are on rank 0.
    """

    pp: int
    vpp: int = 1
    kind: Literal["loop", "v"] = "loop"

    def __post_init__(self) -> None:
        if self.kind == "v" and self.vpp != 2:
            raise ValueError(f"stages in a V are two per rank, not vpp={self.vpp}")

    @property
    def num_stages(self) -> int:
        """In all."""
        return self.pp * self.vpp

    def stage(self, rank: int, chunk: int) -> int:
        """The stage that is a rank's chunk."""
        if self.kind == "v" and chunk == 1:
            return 2 * self.pp - 1 - rank
        return chunk * self.pp + rank

    def home(self, stage: int) -> tuple[int, int]:
        """(rank, chunk) of a stage."""
        chunk, place = divmod(stage, self.pp)
        if self.kind == "v" and chunk == 1:
            return self.pp - 1 - place, 1
        return place, chunk
