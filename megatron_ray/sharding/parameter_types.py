"""Defines the types of the parameter table.

A logical parameter is one unfused, unsharded tensor, as in a checkpoint. A local
parameter is one tensor of a rank, a concatenation of boxes of logical parameters. Pure
Python. Must not know: torch, process groups, models.
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
class RateFactors:
    """Factors on the numbers of a parameter's update, see `sharding.mup`."""

    lr: float = 1.0
    eps: float = 1.0
    decay: float = 1.0
    """On a weight decay that is multiplied by the learning rate."""


NO_FACTORS = RateFactors()
"""The factors of a model without muP."""


@dataclass(frozen=True)
class LogicalParameter:
    """One unfused, unsharded tensor, as in a checkpoint."""

    name: str
    shape: Shape
    """Full shape, without vocabulary padding."""
    init: Init
    shard_dim: int | None
    """Dimension sharded over tp (experts: over etp); None: replicated on every tp
    rank."""
    decay: bool
    """Whether weight decay applies unless a group of the optimizer sets another."""
    sum_over_tp: bool = False
    """Whether this replicated tensor's gradient is summed over tp, because each tp rank
    processes only its tokens (sequence parallelism) or heads (norms of queries and
    keys)."""
    of_expert: bool = False
    """Whether it belongs to the expert grid: sharded over etp, on one ep rank, with its
    gradient reduced over edp instead of dp x cp."""
    is_matrix: bool = False
    """Whether it is the weight of a linear layer other than the output head, which some
    optimizers update as a whole."""
    rates: RateFactors = NO_FACTORS

    @property
    def num_elements(self) -> int:
        """Elements of the full tensor."""
        return prod(self.shape)


@dataclass(frozen=True)
class Part:
    """A logical parameter's box inside a local, possibly fused, tensor.

    Parts are concatenated along dim 0.
    """

    logical: LogicalParameter
    box: Box
    start: int
    """First row of the part in the local tensor."""
    num_kv_replicas: int = 1
    """Number of consecutive tp ranks with this box, if there are fewer key/value heads
    than ranks; each has a part of its gradient."""
    owns_norm: bool = True
    """Whether the global norm counts it: only on the first of these ranks."""


@dataclass(frozen=True)
class LocalParameter:
    """One tensor of a rank: a parameter of a module, and the boxes fused in it."""

    name: str
    """Name of the parameter in the model."""
    shape: Shape
    """Local shape; rows after the last part are vocabulary padding, always zero."""
    parts: tuple[Part, ...]
    is_shared_embedding: bool = False
    """Whether it is a word embedding that the last pipeline stage needs too, for its
    tied head or MTP layers: both stages have it, and their gradients are summed."""
    owns_norm: bool = True
    """Whether the global norm counts it: only on the first of these stages."""
    trainable: bool = True
    """False if frozen: no gradient, no optimizer state."""

    # Fused parts have equal properties (attention's q, k, v; an MLP's gate and up), so
    # those of the first part apply to the tensor.

    @property
    def tp_sharded(self) -> bool:
        """Whether each tp rank has different elements.

        For experts: whether all ranks except replicas have different elements.
        """
        return self.parts[0].logical.shard_dim is not None

    @property
    def sum_over_tp(self) -> bool:
        """Whether the gradient is summed over tp."""
        return self.parts[0].logical.sum_over_tp

    @property
    def of_expert(self) -> bool:
        """Whether it belongs to the expert grid."""
        return self.parts[0].logical.of_expert

    @property
    def num_elements(self) -> int:
        """Elements of the local tensor, padding included."""
        return prod(self.shape)
