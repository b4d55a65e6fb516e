"""Declares the grouped layers of experts, which use the expert grid.

A rank holds consecutive experts (ep), concatenated in one tensor, and a part of each
(etp). Pure Python. Must not know: torch, process groups.
"""

from dataclasses import dataclass

from megatron_ray.sharding.boxes import Box
from megatron_ray.sharding.layer_specs import LayerSpec, ShardPosition, sibling_prefix
from megatron_ray.sharding.parameter_types import (
    Init,
    LocalParameter,
    LogicalParameter,
    Part,
    Shape,
)


@dataclass(frozen=True)
class GroupedColumnSpec(LayerSpec):
    """The first matrices of all experts, with output rows sharded over etp.

    A rank holds consecutive experts, concatenated in one tensor. Each expert has
    matrices of these `names` (e.g. gate and up), each with `outputs` rows.
    """

    num_experts: int
    inputs: int
    outputs: int
    names: tuple[str, ...]
    init: Init

    def parameters(self, name: str, position: ShardPosition) -> list[LocalParameter]:
        """Returns one tensor with the rows of all of the rank's experts."""
        siblings = sibling_prefix(name)
        # Each expert is sharded over etp as an MLP is over tp, so all have the same box.
        experts, width = _cut_experts(siblings, self.num_experts, self.outputs, position)
        box = Box((width * position.etp_rank, 0), (width, self.inputs))
        shape = (self.outputs, self.inputs)
        parts: list[Part] = []
        for expert in experts:
            for inner in self.names:
                logical_name = f"{siblings}{expert}.{inner}.weight"
                logical = _expert_weight(logical_name, shape, self.init, 0)
                # All parts have `width` rows, so the next start follows from their number.
                parts.append(Part(logical, box, width * len(parts)))
        shape = (width * len(parts), self.inputs)
        return [LocalParameter(f"{name}.weight", shape, tuple(parts))]

    def local_experts(self, position: ShardPosition) -> int:
        """Returns how many experts a rank has."""
        return self.num_experts // position.ep


@dataclass(frozen=True)
class GroupedRowSpec(LayerSpec):
    """The last matrices of all experts, with input columns sharded over etp."""

    num_experts: int
    inputs: int
    outputs: int
    name: str
    init: Init

    def parameters(self, name: str, position: ShardPosition) -> list[LocalParameter]:
        """Returns one tensor with the rows of all of the rank's experts."""
        siblings = sibling_prefix(name)
        experts, width = _cut_experts(siblings, self.num_experts, self.inputs, position)
        # Its outputs are partial sums, which the dispatcher reduces over etp.
        box = Box((0, width * position.etp_rank), (self.outputs, width))
        shape = (self.outputs, self.inputs)
        parts: list[Part] = []
        for expert in experts:
            logical_name = f"{siblings}{expert}.{self.name}.weight"
            logical = _expert_weight(logical_name, shape, self.init, 1)
            parts.append(Part(logical, box, self.outputs * len(parts)))
        shape = (self.outputs * len(parts), width)
        return [LocalParameter(f"{name}.weight", shape, tuple(parts))]

    def local_experts(self, position: ShardPosition) -> int:
        """Returns how many experts a rank has."""
        return self.num_experts // position.ep


def _expert_weight(name: str, shape: Shape, init: Init, shard_dim: int) -> LogicalParameter:
    # One logical tensor per expert, so a checkpoint fits any ep and etp.
    return LogicalParameter(
        name, shape, init, shard_dim, decay=True, of_expert=True, is_matrix=True
    )


def _cut_experts(
    prefix: str, num_experts: int, width: int, position: ShardPosition
) -> tuple[range, int]:
    """Returns a rank's range of experts, and its range of their inner width."""
    ep = position.ep
    etp = position.etp
    if num_experts % ep or width % etp:
        raise ValueError(
            f"{prefix}: {num_experts} experts {width} wide do not divide by ep={ep} and "
            f"etp={etp}"
        )
    # Consecutive experts, so that rows sorted by expert are also sorted by ep rank.
    each = num_experts // ep
    first = each * position.ep_rank
    return range(first, first + each), width // etp
