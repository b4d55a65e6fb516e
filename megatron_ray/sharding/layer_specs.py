"""Declares the kinds of layers with weights: shape, sharding, init and reduction.

A spec is the only definition of these. The parameter table contains the rows that specs
emit (`parameters.local_parameters`), and the layer factory creates layers with the
local shapes of their specs (`LayerSpec.shapes`), so table and modules cannot differ.
Pure Python. Must not know: torch, process groups, the layers of a model.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.sharding.boxes import Box
from megatron_ray.sharding.parameter_types import (
    Init,
    LocalParameter,
    LogicalParameter,
    Part,
    Shape,
)

ZEROS = Init("zeros")
ONES = Init("ones")


@dataclass(frozen=True)
class ShardPosition:
    """A rank's position in the grids over which weights are sharded."""

    tp: int = 1
    tp_rank: int = 0
    ep: int = 1
    ep_rank: int = 0
    etp: int = 1
    etp_rank: int = 0
    sequence_parallel: bool = False

    @classmethod
    def of_rank(
        cls, dims: ParallelDims, rank: int, *, sequence_parallel: bool = False
    ) -> "ShardPosition":
        """Returns the position of a global rank."""
        # The same ranks form two grids: attention and MLPs are sharded over tp, experts
        # over ep and etp, where groups consist of other ranks.
        dense = dims.coordinates(rank)
        experts = dims.experts.coordinates(rank)
        return cls(
            tp=dims.tp,
            tp_rank=dense["tp"],
            ep=dims.ep,
            ep_rank=experts["ep"],
            etp=dims.expert_tp,
            etp_rank=experts["etp"],
            sequence_parallel=sequence_parallel,
        )


class LayerSpec(ABC):
    """The declaration of one layer's parameters."""

    @abstractmethod
    def parameters(self, name: str, position: ShardPosition) -> list[LocalParameter]:
        """Returns a rank's tensors of the layer with this module name.

        Raises ValueError when a degree does not divide a sharded dimension.
        """

    def shapes(self, position: ShardPosition) -> dict[str, Shape]:
        """Returns local shapes by the parameter's name in its module, e.g. `weight`."""
        # Derived from the table's rows, so that module and table cannot differ. Shapes do
        # not depend on the name, so any name works.
        shapes = {}
        for parameter in self.parameters("layer", position):
            shapes[parameter.name.removeprefix("layer.")] = parameter.shape
        return shapes


@dataclass(frozen=True)
class Output:
    """One of the logical weights fused in a column-parallel layer."""

    name: str
    """Name at the level of the layer: `q` is fused in the layer `qkv`."""
    rows: int
    num_heads: int | None = None
    """Number of heads, which are replicated if fewer than tp ranks."""

    def num_replicas(self, tp: int) -> int:
        """Returns the number of consecutive tp ranks with the same rows."""
        if self.num_heads is None:
            return 1
        return max(1, tp // self.num_heads)


@dataclass(frozen=True)
class ColumnSpec(LayerSpec):
    """A linear layer of one or more fused weights, with output rows sharded over tp."""

    inputs: int
    outputs: tuple[Output, ...]
    init: Init
    bias: bool = False

    def parameters(self, name: str, position: ShardPosition) -> list[LocalParameter]:
        """Returns the weight and, if any, the bias; both are sharded."""
        table = [self._fused(name, "weight", (self.inputs,), self.init, position)]
        if self.bias:
            table.append(self._fused(name, "bias", (), ZEROS, position))
        return table

    def _fused(
        self, name: str, kind: str, inner: Shape, init: Init, position: ShardPosition
    ) -> LocalParameter:
        """Fuses the parts of one kind; `inner` are the unsharded dimensions."""
        siblings = sibling_prefix(name)
        # Concatenated along dim 0, so that one product computes all of them.
        parts: list[Part] = []
        start = 0
        for output in self.outputs:
            logical = LogicalParameter(
                f"{siblings}{output.name}.{kind}",
                (output.rows, *inner),
                init,
                0,
                decay=kind == "weight",
                is_matrix=kind == "weight",
            )
            part = _column_part(siblings + output.name, output, logical, start, position)
            parts.append(part)
            # Local rows: with replicated key/value heads there are more than rows / tp.
            start += part.box.size[0]
        return LocalParameter(f"{name}.{kind}", (start, *inner), tuple(parts))


def _column_part(
    name: str,
    output: Output,
    logical: LogicalParameter,
    start: int,
    position: ShardPosition,
) -> Part:
    # With replicas, tp / replicas ranks split the rows, and neighbours have the same box.
    replicas = output.num_replicas(position.tp)
    rows = _divide(name, output.rows * replicas, position.tp)
    first = rows * (position.tp_rank // replicas)
    # A bias has only the row dimension, a weight also has the inputs.
    inner = logical.shape[1:]
    box = Box((first, *_zeros(inner)), (rows, *inner))
    # Only the first of equal boxes counts in the global norm.
    owns_norm = position.tp_rank % replicas == 0
    return Part(logical, box, start, replicas, owns_norm)


@dataclass(frozen=True)
class QKVSpec(ColumnSpec):
    """The fused projection to queries, keys and values."""

    heads: int = 1
    groups: int = 1

    def local_heads(self, tp: int) -> int:
        """Returns the number of query heads of one rank."""
        return self.heads // tp

    def local_groups(self, tp: int) -> int:
        """Returns the number of key/value heads of one rank, at least one."""
        # With fewer heads than ranks each rank has a replica of one head.
        return max(self.groups, tp) // tp


@dataclass(frozen=True)
class RowSpec(LayerSpec):
    """A linear layer with input columns sharded over tp.

    The bias is replicated on every rank and is added after the sum over tp.
    """

    inputs: int
    outputs: int
    init: Init
    bias: bool = False

    def parameters(self, name: str, position: ShardPosition) -> list[LocalParameter]:
        """Returns the sharded weight and, if any, the replicated bias."""
        # Never fused, so it has one part.
        columns = _divide(name, self.inputs, position.tp)
        logical = LogicalParameter(
            f"{name}.weight",
            (self.outputs, self.inputs),
            self.init,
            1,
            decay=True,
            is_matrix=True,
        )
        box = Box((0, columns * position.tp_rank), (self.outputs, columns))
        weight = LocalParameter(logical.name, box.size, (Part(logical, box, 0),))
        # The bias is not sharded: it is added to the sum, so each rank needs all of it.
        if not self.bias:
            return [weight]
        return [weight, _whole(f"{name}.bias", (self.outputs,), ZEROS, position)]


@dataclass(frozen=True)
class ReplicatedSpec(LayerSpec):
    """A matrix [outputs, inputs] replicated on every rank: a linear layer or a table."""

    inputs: int
    outputs: int
    init: Init
    bias: bool = False
    is_table: bool = False
    """Whether it is a table, whose rows are looked up."""

    def parameters(self, name: str, position: ShardPosition) -> list[LocalParameter]:
        """Returns the replicated weight and, if any, bias."""
        shape = (self.outputs, self.inputs)
        weight = _whole(f"{name}.weight", shape, self.init, position, decay=True)
        if not self.is_table:
            weight = _as_matrix(weight)
        table = [weight]
        if self.bias:
            table.append(_whole(f"{name}.bias", (self.outputs,), ZEROS, position))
        return table


@dataclass(frozen=True)
class NormSpec(LayerSpec):
    """A norm over a vector of `width`, replicated on every rank."""

    width: int
    eps: float
    """Added to the variance."""
    bias: bool = False
    zero_centered: bool = False
    """Activations are multiplied by 1 + weight."""
    is_over_heads: bool = False
    """Each tp rank normalizes its own heads, so the gradient is summed over tp even
    without sequence parallelism."""

    def parameters(self, name: str, position: ShardPosition) -> list[LocalParameter]:
        """Returns the replicated weight and, if any, bias."""
        shape = (self.width,)
        init = ONES
        # The norm multiplies by 1 + weight, so zero is the identity.
        if self.zero_centered:
            init = ZEROS
        partial = self.is_over_heads
        table = [_whole(f"{name}.weight", shape, init, position, partial=partial)]
        if self.bias:
            table.append(_whole(f"{name}.bias", shape, ZEROS, position, partial=partial))
        return table


@dataclass(frozen=True)
class VocabularySpec(LayerSpec):
    """The word embedding or the output head: one row per token, sharded over tp."""

    vocabulary: int
    """Rows without padding."""
    multiple: int
    """Rows are padded to a multiple of this times tp."""
    width: int
    init: Init
    logical_name: str | None = None
    """Name of the embedding's weight, for a tied head on a later stage, which holds a
    copy of it."""
    is_shared_embedding: bool = False
    owns_norm: bool = True

    def parameters(self, name: str, position: ShardPosition) -> list[LocalParameter]:
        """Returns this rank's rows; rows beyond the vocabulary are padding."""
        name = f"{name}.weight"
        logical = LogicalParameter(
            self.logical_name or name,
            (self.vocabulary, self.width),
            self.init,
            0,
            decay=True,
        )
        # All ranks have the same number of rows. The last ranks may have padding only, with
        # an empty box at the vocabulary's end.
        rows = padded_rows(self.vocabulary, self.multiple, position.tp) // position.tp
        first = min(position.tp_rank * rows, self.vocabulary)
        box = Box((first, 0), (self.valid_rows(position), self.width))
        return [
            LocalParameter(
                name,
                (rows, self.width),
                (Part(logical, box, 0),),
                self.is_shared_embedding,
                self.owns_norm,
            )
        ]

    def valid_rows(self, position: ShardPosition) -> int:
        """Returns the number of a rank's rows without padding."""
        rows = padded_rows(self.vocabulary, self.multiple, position.tp) // position.tp
        first = min(position.tp_rank * rows, self.vocabulary)
        return min(first + rows, self.vocabulary) - first


def padded_rows(vocabulary: int, multiple: int, tp: int) -> int:
    """Returns the padded rows of the vocabulary over all tp ranks (Megatron's rule)."""
    # Rounded up. The multiple depends on tp, so checkpoints store unpadded rows only.
    return -(-vocabulary // (multiple * tp)) * multiple * tp


def _whole(
    name: str,
    shape: Shape,
    init: Init,
    position: ShardPosition,
    *,
    decay: bool = False,
    partial: bool = False,
) -> LocalParameter:
    """Returns a tensor that is replicated over tp.

    With `partial`, each tp rank has a partial gradient, even without sequence
    parallelism.
    """
    # Under sequence parallelism a rank processes its own tokens only, so its gradient is
    # always partial.
    sum_over_tp = position.sequence_parallel or partial
    logical = LogicalParameter(name, shape, init, None, decay, sum_over_tp=sum_over_tp)
    return LocalParameter(name, shape, (Part(logical, Box(_zeros(shape), shape), 0),))


def _as_matrix(weight: LocalParameter) -> LocalParameter:
    (part,) = weight.parts
    logical = replace(part.logical, is_matrix=True)
    return replace(weight, parts=(replace(part, logical=logical),))


def _zeros(shape: Sequence[int]) -> Shape:
    return (0,) * len(shape)


def sibling_prefix(name: str) -> str:
    """Returns the common prefix of the names of a module and its siblings."""
    return name[: name.rfind(".") + 1]


def _divide(name: str, size: int, tp: int) -> int:
    if size % tp:
        raise ValueError(f"{name}: {size} is not divisible by tp={tp}")
    return size // tp
