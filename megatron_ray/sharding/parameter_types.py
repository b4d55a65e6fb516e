"""Defines what the parameter table consists of.

A logical parameter is one unfused tensor as a checkpoint names it, whatever the layout. A
local parameter is one tensor on one rank, in which boxes of logical parameters lie one
after another. Pure Python. Must not know: torch, process groups, models.
"""

from dataclasses import dataclass
from math import prod
from typing import Literal

from megatron_ray.sharding.boxes import Box

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Init:
    """The initial values of a logical parameter."""

    kind: Literal["normal", "ones", "zeros"]
    std: float = 0.0


@dataclass(frozen=True)
class LogicalParameter:
    """One unfused tensor as a checkpoint names it, whatever the layout."""

    name: str
    shape: Shape
    """Full shape, without vocabulary padding."""
    init: Init
    shard_dim: int | None
    """Dimension cut over tp (an expert's: over etp); None: every tp rank has the whole
    tensor."""
    decay: bool
    """Whether weight decay applies."""
    sum_over_tp: bool = False
    """Each tp rank sees only its tokens (sequence parallelism) or its heads (norms of
    queries and keys), so this replicated tensor's gradient is summed over tp."""
    of_expert: bool = False
    """Lies in the expert grid: cut over etp, on one ep rank, its gradient reduced over
    edp and not over dp x cp."""

    @property
    def num_elements(self) -> int:
        """Elements of the full tensor."""
        return prod(self.shape)


@dataclass(frozen=True)
class Part:
    """A logical parameter's box inside a local, possibly fused, tensor.

    Parts lie one after another along dim 0.
    """

    logical: LogicalParameter
    box: Box
    start: int
    """First row of the part in the local tensor."""
    num_kv_replicas: int = 1
    """Neighbouring tp ranks that have this very box, where there are fewer key/value
    heads than ranks; each has a part of its gradient."""
    owns_norm: bool = True
    """False but for the first of those, so that the global norm counts it once."""


@dataclass(frozen=True)
class LocalParameter:
    """One tensor of one rank: a parameter of its module, and the boxes fused in it."""

    name: str
    """The module's name of the parameter."""
    shape: Shape
    """Local shape; rows beyond the last part are vocabulary padding, always zero."""
    parts: tuple[Part, ...]
    is_shared_embedding: bool = False
    """A word embedding that the last pipeline stage needs too, for its tied head or its
    MTP layers: both stages have it, and their gradients are added up."""
    owns_norm: bool = True
    """False for the second of those, so that the global norm counts it once."""
    trainable: bool = True
    """False where it is frozen: no gradient, no optimizer state."""

    # Fused parts have the same rules (attention's q, k, v; an MLP's gate and up), so the
    # first part's rules are those of the tensor.

    @property
    def decay(self) -> bool:
        """Whether weight decay applies."""
        return self.parts[0].logical.decay

    @property
    def tp_sharded(self) -> bool:
        """Whether each tp rank has different elements.

        For those of experts: whether all ranks have but their replicas.
        """
        return self.parts[0].logical.shard_dim is not None

    @property
    def sum_over_tp(self) -> bool:
        """Whether the gradient is summed over tp."""
        return self.parts[0].logical.sum_over_tp

    @property
    def of_expert(self) -> bool:
        """Whether its replicas are those of the expert grid."""
        return self.parts[0].logical.of_expert

    @property
    def num_elements(self) -> int:
        """Elements of the local tensor, padding included."""
        return prod(self.shape)
